"""Asking the engine from asyncio: answers of one request side by side, cancelled when unwanted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType

from mst.serve.engine import Engine, EngineFailure, Prompt, Token


class Asked:
    """Prompts that an engine works on. Leaving the block cancels what has not ended."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt]) -> None:
        """Nothing is submitted yet."""
        self._engine = engine
        self._prompts = prompts
        self._tickets: dict[int, int] = {}
        self._told: asyncio.Queue[tuple[int, Token | EngineFailure]] = asyncio.Queue()
        self._left = False
        self._lock = threading.Lock()

    async def __aenter__(self) -> Asked:
        """Submit all; when one is refused, none is left behind."""
        loop = asyncio.get_running_loop()
        try:
            for index, prompt in enumerate(self._prompts):

                def told(item: Token | EngineFailure, index: int = index) -> None:
                    loop.call_soon_threadsafe(self._told.put_nowait, (index, item))

                # A schema is compiled in here, which may take a while.
                await asyncio.to_thread(self._submit, index, prompt, told)
        except BaseException:
            self._cancel_all()
            raise
        return self

    def _submit(
        self, index: int, prompt: Prompt, told: Callable[[Token | EngineFailure], None]
    ) -> None:
        ticket = self._engine.submit(prompt, told)
        with self._lock:
            if not self._left:
                self._tickets[index] = ticket
                return
        # The caller went away meanwhile, which ends the waiting and not this thread.
        self._engine.cancel(ticket)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Cancel what has not ended."""
        self._cancel_all()

    def _cancel_all(self) -> None:
        with self._lock:
            self._left = True
            for ticket in self._tickets.values():
                self._engine.cancel(ticket)
            self._tickets.clear()

    def stop(self, index: int) -> None:
        """End one answer; nothing more comes of it."""
        ticket = self._tickets.pop(index, None)
        if ticket is not None:
            self._engine.cancel(ticket)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Token]]:
        """Yield (number of the prompt, token) as they come, until all have ended.

        Raises:
            EngineFailure: an answer can't be finished.
        """
        while self._tickets:
            index, item = await self._told.get()
            if index not in self._tickets:
                continue  # told before it was stopped
            if isinstance(item, EngineFailure):
                del self._tickets[index]
                raise item
            if item.finish is not None:
                del self._tickets[index]
            yield index, item
