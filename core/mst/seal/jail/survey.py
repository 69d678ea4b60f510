"""Which layers of the jail this machine gives: each is entered by a child, and tested there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from mst.seal.jail.seal import JailRequest, Scene, Seal, Way

_SECONDS = 60


@dataclass(frozen=True)
class Reached:
    """What came of asking for a layer.

    Attributes:
        asked: the value of --jail.
        seal: the jail; None when there is none, or it leaks.
        fault: why.
    """

    asked: str
    seal: Seal | None
    fault: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "asked": self.asked,
            "seal": None if self.seal is None else self.seal.to_json(),
            "fault": self.fault,
        }


def survey() -> tuple[Reached, ...]:
    """Return what each value of --jail gives here, the default first."""
    return tuple(_reach(mode) for mode in ("auto", "namespace", "broker", "seccomp"))


def _reach(mode: str) -> Reached:
    from mst.seal.jail.holder import reporting

    try:
        done = subprocess.run(
            [sys.executable, *reporting(JailRequest(mode), Scene())],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Reached(mode, None, f"no answer within {_SECONDS} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return Reached(mode, None, lines[-1] if lines else f"exit code {done.returncode}")
    return Reached(mode, _read(json.loads(done.stdout)))


def _read(plain: dict[str, Any]) -> Seal:
    ways = tuple(Way(**each) for each in plain["ways"])
    refused = tuple((layer, reason) for layer, reason in plain["refused"])
    lists = {"ways": ways, "refused": refused, "allow_net": tuple(plain["allow_net"])}
    return Seal(**{**plain, **lists})
