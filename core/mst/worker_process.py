"""What every worker process shares: stopping on request, dying with its parent, ending in words."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mst import rundir
from mst.errors import EXIT_FAILED, EXIT_INTERRUPTED, Interrupted, MstError, PeerFailed
from mst.launch import interruptible
from mst.seal.jail.words import explain
from mst.seal.memory import core_dumps_off
from mst.seal.redaction import bug_report, quieten

_PR_SET_PDEATHSIG = 1


class StopAsked:
    """Turns the first Ctrl-C (or SIGTERM) into a wish to stop after the running step.

    Outside the loop there is nothing to save, so there it stops at once; a second Ctrl-C always
    does. A second SIGTERM says nothing new: Slurm and systemd send one to each process of a job,
    and those above hand theirs on.
    """

    def __init__(self) -> None:
        """Take over both signals."""
        self.asked = False
        self.in_loop = False
        self.raised = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGTERM and (self.asked or self.raised):
            return
        if self.asked or not self.in_loop:
            self.raised = True
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self) -> bool:
        """Return whether the run should end."""
        return self.asked


def die_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when its parent dies."""
    # Linux only: without it, a killed `mst train` would leave its worker training unseen.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def say(line: str) -> None:
    """Print a line at once, for whoever still reads it."""
    with suppress(OSError):
        print(line, flush=True)


def _record(run: Path | None, status: str, message: str) -> None:
    if run is not None:
        with suppress(MstError):
            rundir.update_manifest(run, status=status, finished=rundir.now(), error=message)


def guarded(job: Callable[[], None], run: Path | None = None, stop: StopAsked | None = None) -> int:
    """Do the job, print a user's error without a traceback, and return the exit code.

    A bug is shown and recorded by its place and type alone: its text might quote a row.

    Args:
        job: the worker's whole task.
        run: the run directory in whose manifest the ending is recorded, if there is one.
        stop: tells an error that Ctrl-C has led to from others.
    """
    core_dumps_off()
    quieten()
    explain(os.environ)
    try:
        interruptible()
        _unless_stopped(job, stop)
    except PeerFailed as error:
        return error.exit_code
    except MstError as error:
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        _record(run, status, str(error))
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        message = "stopped."
        if run is not None:
            message += f" Go on with: mst train --output-dir {run} --resume"
        _record(run, "interrupted", message)
        print(f"Interrupted: {message}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            raise
        _record(run, "failed", f"a bug: {type(error).__name__}")
        sys.stderr.write(bug_report(error))
        return EXIT_FAILED
    return 0


def _unless_stopped(job: Callable[[], None], stop: StopAsked | None) -> None:
    """Do the job, and raise KeyboardInterrupt for whatever else Ctrl-C has become on its way."""
    try:
        job()
    except (Interrupted, PeerFailed):
        raise
    except Exception:
        # transformers tells an import that was broken off as a missing module.
        if stop is not None and stop.raised:
            raise KeyboardInterrupt from None
        raise
