"""Processes that the checks start: their environment, their limit, and how they ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mst.launch import worker_environment


@dataclass(frozen=True)
class Ended:
    """How a child process ended: its exit code (negative: the signal; None: it was too late)."""

    code: int | None
    output: str
    errors: str


def start(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    cwd: Path | None = None,
) -> subprocess.Popen[str]:
    """Start `python -m module arguments` with both outputs captured."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=dict(environment),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def wait(child: subprocess.Popen[str], seconds: float) -> Ended:
    """Return how the child ended; it is killed when it is late."""
    try:
        output, errors = child.communicate(timeout=seconds)
        return Ended(child.returncode, output, errors)
    except subprocess.TimeoutExpired:
        child.kill()
        output, errors = child.communicate()
        return Ended(None, output, errors)


def ending(ended: Ended, seconds: float) -> str:
    """Return in words how a child ended, with the last line that it wrote; "" when well."""
    if ended.code == 0:
        return ""
    if ended.code is None:
        return f"did not end in {seconds:g} s"
    return f"{how(ended.code)}: {last_line(ended.errors) or last_line(ended.output)}".rstrip(": ")


def how(code: int) -> str:
    """Return an exit code in words, such as "crashed (SIGSEGV)"."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"crashed ({signal.Signals(-code).name})"
    except ValueError:
        return f"crashed (signal {-code})"


def last_line(text: str) -> str:
    """Return the last line that is not blank, at most 300 characters of it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def device_environment(plan: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a training worker, as `mst train` makes it."""
    return worker_environment(os.environ, plan)


def first_line(text: str) -> str:
    """Return the first line that is not blank, at most 300 characters of it."""
    # torch's errors begin with what is wrong; a C++ stack trace may follow.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
