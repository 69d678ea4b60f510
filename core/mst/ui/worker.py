"""Run as `python -m mst.ui.worker JOB LISTENER CONTROL NOTES [REQUESTS ANSWERS]`, in the jail."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress

from mst import serial
from mst.serve.http.limits import Limits
from mst.serve.http.server import serve
from mst.ui.app import App
from mst.ui.asking import Outside, Pipes
from mst.ui.job import UiJob
from mst.ui.sessions import Sessions
from mst.worker_process import die_with_parent, guarded, say

# Streams end by themselves within a second or five; what is read is read again.
_LIMITS = Limits(grace_seconds=1.0)


def work(job: UiJob, listener: int, control: int, notes: int, pipes: Pipes | None) -> None:
    """Serve the page until told to end."""
    outside = None if pipes is None else Outside(pipes)

    def show(token: str) -> None:
        # Behind #, so that the browser keeps it to itself: it is in no request and no log of one.
        say(f"page    http://127.0.0.1:{job.port}/enter#{token}")

    def noted(event: str, **facts: str) -> None:
        with suppress(OSError):  # who would write it into the log is gone
            os.write(notes, json.dumps({"event": event, **facts}).encode() + b"\n")

    app = App(job, Sessions(job.port, show), outside, noted)
    # The first look at many runs takes a while that nobody should wait for.
    app.index.entries()

    with socket.socket(fileno=listener) as made:
        serve(app, made, _LIMITS, None, control)
    if outside is not None:
        outside.close()
    say("ended")


def main(argv: list[str]) -> int:
    """Do the job that the first argument describes."""
    die_with_parent()
    job = serial.from_json(UiJob, json.loads(argv[0]))
    listener, control, notes, *rest = map(int, argv[1:])
    pipes = Pipes(*rest) if rest else None
    return guarded(lambda: work(job, listener, control, notes, pipes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
