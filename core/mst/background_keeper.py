"""The process beside a command in the background: it starts it, waits, and notes how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mst.background import ENDED, PROCESS, WORK, identity
from mst.durable import write_text

# A full disk is given this long to be made room on.
_WRITING_SECONDS = 600.0


def main(directory: Path) -> int:
    """Leave the caller's session, run the work, and note its end.

    The caller's child returns 0 as soon as the command runs, and 1 if it does not come to that.
    """
    ready, tell = os.pipe()
    if os.fork():
        os.close(tell)
        return 0 if os.read(ready, 1) else 1
    os.close(ready)
    os.setsid()
    return _keep(directory, tell)


def _keep(directory: Path, tell: int) -> int:
    facts = json.loads((directory / WORK).read_text(encoding="utf-8"))
    # A shell hands down to `mst menu &` that interrupts are ignored, and this process would too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    command: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, _: object) -> None:
        if command is not None:
            command.send_signal(number)

    # A handler, since a signal that is ignored would stay so in the command.
    signal.signal(signal.SIGHUP, lambda *_: None)
    signal.signal(signal.SIGTERM, hand_on)
    command = subprocess.Popen(
        [sys.executable, "-m", "mst", *facts["arguments"]],
        stdin=subprocess.DEVNULL,
        env=_environment(os.environ),
        start_new_session=True,
    )
    note = {
        "keeper": os.getpid(),
        "keeper_identity": identity(os.getpid()),
        "command": command.pid,
        # Not waited for yet, so the number is its own even where it has ended already.
        "command_identity": identity(command.pid),
    }
    _write(directory / PROCESS, note)
    with suppress(OSError):  # whoever started it has gone in between
        os.write(tell, b".")
    os.close(tell)
    code = command.wait()
    _write(directory / ENDED, {"exit_code": 128 - code if code < 0 else code})
    return 0


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the command's environment: its output is read as UTF-8, while it is written."""
    return {**environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}


def _write(path: Path, note: Mapping[str, object]) -> None:
    deadline = time.monotonic() + _WRITING_SECONDS
    while True:
        try:
            return write_text(path, json.dumps(note) + "\n", 0o600)
        except OSError:
            if time.monotonic() > deadline or not path.parent.is_dir():
                raise
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
