"""Run as `python -m mst.ui.starter REQUESTS ANSWERS PLACES`: starts and stops runs, unjailed.

The page's server sits in a jail in which nothing can be started that needs more. It asks this
process through a pipe, and gets no further with it than the person who looks at the page: each
request is checked here, a run by its id, and what is started makes its own jail.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mst import background, rundir, serial
from mst.errors import MstError, UsageError
from mst.seal.keys.run_key import RUN_KEY
from mst.ui.choices import StartRequest, run_directory, start_arguments
from mst.ui.index import Entry, Index, id_of
from mst.ui.job import Places

# A body of the page's 64 KiB becomes three times as long, where each letter is escaped.
_MOST_BYTES = 1 << 18


class Starter:
    """Does what is asked, under the directories that were named."""

    def __init__(self, places: Places) -> None:
        """Start and stop nothing yet."""
        self._places = places
        self._index = Index([Path(each) for each in places.runs])

    def answer(self, line: bytes) -> dict[str, Any]:
        """Do what a line of JSON asks, and return what came of it; never raises."""
        try:
            asked = json.loads(line)
            if asked["do"] == "start":
                return self.start(StartRequest.model_validate(asked["request"]))
            run = self._run(str(asked["run"]))
            return {"resume": self.resume, "stop": self.stop}[asked["do"]](run)
        except MstError as error:
            return {"error": str(error)}
        except Exception as error:
            return {"error": f"a bug in mst: {type(error).__name__}"}

    def _run(self, name: str) -> Entry:
        found = self._index.find(name)
        if found is None:
            raise UsageError("that run is not there. Load the page again.")
        return found

    def start(self, request: StartRequest) -> dict[str, Any]:
        """Start a run.

        Raises:
            MstError: it is not allowed, or can't be started.
        """
        path = run_directory(request, self._places)
        work = background.start(start_arguments(request, self._places))
        return {"run": id_of(path), "work": work.name}

    def resume(self, run: Entry) -> dict[str, Any]:
        """Go on with a run.

        Raises:
            MstError: it is not one to go on with, or can't be started.
        """
        if run.summary.state not in ("interrupted", "killed", "failed"):
            raise UsageError(f"a run that is {run.summary.state} can't be resumed.")
        if (run.path / RUN_KEY).exists():
            raise UsageError(
                "this run is encrypted, and its key is asked for in a terminal:"
                f" mst train --output-dir {run.path} --resume"
            )
        work = background.start(("train", f"--output-dir={run.path}", "--resume"))
        return {"run": run.id, "work": work.name}

    def stop(self, run: Entry) -> dict[str, Any]:
        """Ask a run to save and end.

        Raises:
            MstError: it doesn't run, or can't be stopped.
        """
        holder = holder_of(run.path)
        if run.summary.state != "running" or holder is None:
            raise UsageError("this run doesn't run on this machine, so there is nothing to stop.")
        own = [each for each in background.works() if each.pid == holder]
        if own and own[-1].state == "running":
            background.stop(own[-1])
        else:
            # In a terminal, or under a service manager: its own process hands it on to its workers.
            try:
                os.kill(holder, signal.SIGTERM)
            except OSError as error:
                raise UsageError(f"process {holder} can't be stopped: {error.strerror}.") from None
        return {"run": run.id, "work": own[-1].name if own else None}


def holder_of(run: Path) -> int | None:
    """Return the process that holds a run's lock, and has it open; None where none can be found.

    The number in the lock alone would not do: it may be an old one, which another program has.
    """
    lock = run / rundir.LOCK
    with suppress(OSError, ValueError):
        number = int(lock.read_text(encoding="ascii"))
        want = os.stat(lock)
        for name in os.listdir(f"/proc/{number}/fd"):
            with suppress(OSError):
                found = os.stat(f"/proc/{number}/fd/{name}")
                if (found.st_dev, found.st_ino) == (want.st_dev, want.st_ino):
                    return number
    return None


def main(argv: Sequence[str]) -> int:
    """Answer until the pipe of requests ends."""
    # Ctrl-C and SIGTERM are the page's to answer. Not ignored: what is started would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    requests, answers, places = argv
    starter = Starter(serial.loads(Places, places))
    os.set_inheritable(int(requests), False)
    os.set_inheritable(int(answers), False)
    with open(int(requests), "rb") as lines, open(int(answers), "wb", buffering=0) as told:
        # What is no whole line is none of the page's, and two answers to it would be one too many.
        while (line := lines.readline(_MOST_BYTES)).endswith(b"\n"):
            told.write(json.dumps(starter.answer(line)).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
