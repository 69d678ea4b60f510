"""One thread for all that a model computes in a process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class OwnThread:
    """Does what it is given, one after the other.

    A model is loaded, asked and run in the same thread, because libgomp keeps a pool of threads
    for every thread that has computed: with more of them than cores they no longer wait awake for
    the next operator, and SmolLM2-135M wrote 20 tokens a second instead of 26 (two cores of an AMD
    EPYC, Zen 4, torch 2.13.0).
    """

    def __init__(self) -> None:
        """Start it; it does not keep the process from ending."""
        self._given: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._do, name="mst-engine", daemon=True)
        self._thread.start()

    def start(self, work: Callable[[], object]) -> None:
        """Let it do something that deals with its own errors."""
        self._given.put(work)

    def result(self, work: Callable[[], _Result]) -> _Result:
        """Let it do something, wait, and return what comes of it, or raise that."""
        future: Future[Any] = Future()

        def done() -> None:
            try:
                future.set_result(work())
            # Raised again where the result is awaited.
            except BaseException as error:
                future.set_exception(error)

        self._given.put(done)
        found: _Result = future.result()
        return found

    def join(self) -> None:
        """Wait until all that was given is done, and end."""
        self._given.put(None)
        self._thread.join()

    def _do(self) -> None:
        while (work := self._given.get()) is not None:
            work()
