"""Work in a process of its own, whose memory goes with it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from mst.errors import EXIT_FAILED, EXIT_INTERRUPTED, MstError
from mst.launch import how_it_ended
from mst.seal.jail.seal import current
from mst.seal.redaction import bug_report
from mst.worker_process import die_with_parent


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `work` returns, which is plain enough for JSON.

    It is done in a fork of this process, so that what it imports and reads takes no memory
    afterwards. Where this process is not a command's own, it is done here: a program that calls
    mst may have threads, which a fork has not.

    Raises:
        MstError: what `work` has raised, by its type and text; or the process was killed.
        SystemExit: it ended otherwise, and has said why.
    """
    if current() is None:
        return work()
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = EXIT_FAILED
        try:
            code = _tell(work, writing)
        finally:
            os._exit(code)
    os.close(writing)
    try:
        with open(reading, "rb") as pipe:
            told = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGTERM)
        raise
    finally:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        raise MstError(f"{how_it_ended(128 - code)}.")
    if code or not told:
        raise SystemExit(code)
    found: dict[str, Any] = json.loads(told)
    if "error" in found:
        raise _again(*found["error"])
    return found


def _tell(work: Callable[[], dict[str, Any]], pipe: int) -> int:
    """Write what comes of work into a pipe; return this process's exit code."""
    die_with_parent()
    try:
        told = work()
    except MstError as error:
        kind = type(error)
        told = {"error": [kind.__module__, kind.__name__, str(error)]}
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            return error.code or 0
        sys.stderr.write(bug_report(error))
        return EXIT_FAILED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    with open(pipe, "wb") as writing:
        writing.write(json.dumps(told).encode())
    return 0


def _again(module: str, name: str, text: str) -> MstError:
    """Return an error as it was in another process; what it held beside its text is left there."""
    kind: type[MstError] = getattr(importlib.import_module(module), name)
    made = kind.__new__(kind, text)
    made.args = (text,)
    return made
