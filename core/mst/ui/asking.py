"""Asking the process outside the jail to start or stop a run; it lives as long as the page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from mst import serial
from mst.errors import MstError
from mst.serve.http.listening import start_outside
from mst.ui.job import Places

_END_SECONDS = 10.0


class ActionRefused(MstError):
    """A run was not started, stopped or resumed."""


@dataclass(frozen=True)
class Pipes:
    """Ends of the pipes to the process that starts runs: where it is asked, where it answers."""

    requests: int
    answers: int


class Outside:
    """The process outside, as the page's server sees it: one request at a time."""

    def __init__(self, pipes: Pipes) -> None:
        """Ask through these pipes."""
        self._requests: IO[bytes] = os.fdopen(pipes.requests, "wb", buffering=0)
        self._answers: IO[bytes] = os.fdopen(pipes.answers, "rb")
        self._alone = threading.Lock()

    def close(self) -> None:
        """Close both pipes."""
        with contextlib.suppress(OSError):
            self._requests.close()
        self._answers.close()

    async def ask(self, do: str, **asked: Any) -> dict[str, Any]:
        """Return what came of a request.

        Raises:
            ActionRefused: says why.
        """
        # In a thread, which goes on when whoever asked is gone: no answer is left for the next.
        found = await asyncio.to_thread(self._ask, {"do": do, **asked})
        if "error" in found:
            raise ActionRefused(found["error"])
        return found

    def _ask(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        with self._alone:
            try:
                self._requests.write(json.dumps(asked).encode() + b"\n")
                line = self._answers.readline()
            except OSError:
                line = b""
        if not line:
            return {"error": "what starts runs has ended. Start mst ui again."}
        found: dict[str, Any] = json.loads(line)
        return found


@contextlib.contextmanager
def beside(places: Places, environ: Mapping[str, str]) -> Iterator[Pipes]:
    """Start the process that starts runs, outside the jail; it ends after."""
    asked, requests = os.pipe()
    answers, told = os.pipe()
    command = [sys.executable, "-m", "mst.ui.starter", str(asked), str(told), serial.dumps(places)]
    process = start_outside(command, (asked, told), environ)
    os.close(asked)
    os.close(told)
    try:
        yield Pipes(requests, answers)
    finally:
        for each in (requests, answers):
            with contextlib.suppress(OSError):
                os.close(each)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
