"""One command of mst in a process of its own: watched, timed, and ended when it hangs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mst.rundir import METRICS

_POLL_SECONDS = 0.1
# What a command gets to save and to end its workers by itself.
_GRACE_SECONDS = 10.0
_ERROR = re.compile(r"^(\w+): (.*)$")
# Enough for every error of mst; a warning of a library that fills a file is cut.
_MOST_TEXT = 4000


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; 128 + N after signal N.
        seconds: that it took.
        late: it was ended for taking too long.
        error: kind of its error: the name of an `MstError`, "" where it named none.
        message: of the error.
        output: what it printed.
    """

    code: int
    seconds: float
    late: bool
    error: str
    message: str
    output: str


def mst_command(*arguments: str) -> list[str]:
    """Return the command line of an mst command in this environment."""
    return [sys.executable, "-m", "mst.bench.command", *arguments]


def run_watched(
    command: Sequence[str],
    log: Path,
    environ: Mapping[str, str],
    timeout: float,
    look: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a command and return how it ended.

    Args:
        command: its command line.
        log: takes its standard error; its output lies beside it, as `.out`.
        environ: its environment.
        timeout: seconds after which it and all that it has started are ended.
        look: is called about ten times a second.
    """
    began = time.monotonic()
    printed = log.with_suffix(".out")
    with started(command, log, printed, environ) as process:
        late = False
        while process.poll() is None:
            look()
            if time.monotonic() - began > timeout:
                late = True
                end(process)
                break
            time.sleep(_POLL_SECONDS)
        look()
    code = process.returncode
    error, message = error_in(_tail(log))
    return Ended(
        128 - code if code < 0 else code,
        time.monotonic() - began,
        late,
        error,
        message,
        _tail(printed),
    )


@contextlib.contextmanager
def started(
    command: Sequence[str], log: Path, printed: Path, environ: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command as the leader of a process group, which is ended when this is left."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors, printed.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group: asked first, killed after some seconds."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
    # A worker that hangs in a driver outlives the command that waits for it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def error_in(text: str) -> tuple[str, str]:
    """Return kind and message of the last error that mst printed; two empty texts for none."""
    for line in reversed(text.splitlines()):
        found = _ERROR.match(line)
        if found:
            return found[1], found[2]
    return "", text.strip().splitlines()[-1] if text.strip() else ""


def _tail(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace")[-_MOST_TEXT:]
    return ""


class Steps:
    """Follows a run's metrics as they are written, and tells of each step once."""

    def __init__(self, run: Path, told: Callable[[int], None]) -> None:
        """Tell of the steps of the run in this directory."""
        self._file = run / METRICS
        self._told = told
        self._place = 0
        self.done = 0

    def look(self) -> None:
        """Read what has been added."""
        try:
            with self._file.open("rb") as file:
                file.seek(self._place)
                added = file.read()
        except OSError:  # not there yet
            return
        whole = added[: added.rfind(b"\n") + 1]
        self._place += len(whole)
        for line in whole.splitlines():
            if b'"loss"' in line and b'"eval_loss"' not in line:
                self.done += 1
                self._told(self.done)
