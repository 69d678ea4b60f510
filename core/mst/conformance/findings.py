"""What a check found, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mst.conformance.subject import Subject

PASS, FAIL, SKIP = "pass", "fail", "skip"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        status: "pass", "fail" or "skip".
        found: what was found, in words and figures.
        advice: what the vendor should do about it; "" when the status is "pass".
        figures: the measured values, for the report.
    """

    status: str
    found: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A finished check: its stable id, the promise that it proves, and what was found."""

    id: str
    title: str
    status: str
    found: str
    advice: str
    figures: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Context:
    """What a check is given.

    Attributes:
        subject: the backend that is checked.
        workspace: a directory of this run of the kit, shared by its checks.
        at: tells which part runs, so that a crash or a hang can be named.
    """

    subject: Subject
    workspace: Path
    at: Callable[[str], None]


def passed(found: str, **figures: Any) -> Finding:
    """Return the finding of a promise that is kept."""
    return Finding(PASS, found, "", figures)


def failed(found: str, advice: str, **figures: Any) -> Finding:
    """Return the finding of a promise that is broken, with what to do."""
    return Finding(FAIL, found, advice, figures)


def skipped(reason: str) -> Finding:
    """Return the finding of a check that makes no sense here."""
    return Finding(SKIP, reason)


def verdict(faults: list[str], advice: str, otherwise: str, **figures: Any) -> Finding:
    """Return a failure that lists the faults, or a pass when there is none."""
    if faults:
        return failed("; ".join(faults), advice, **figures)
    return passed(otherwise, **figures)
