"""What an export computes itself while a target's process quantizes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Concatenate, ParamSpec, TypeVar

from mst.errors import Interrupted

T = TypeVar("T")
P = ParamSpec("P")
# Called now and then by what is computed; raises where nobody waits for it any more.
GoOn = Callable[[], None]


class Meanwhile:
    """Computes one thing after another in a thread of its own; leaving the block ends that soon.

    Quantizing is mostly Python of one core, so another core has time for products.
    """

    def __init__(self, beside: bool) -> None:
        """Begin with nothing.

        Args:
            beside: in a thread; if not, everything is computed when it is asked for.
        """
        self._pool = ThreadPoolExecutor(1) if beside else None
        self._left = threading.Event()

    def __enter__(self) -> Meanwhile:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop what has not begun, and wait for what runs to see that it is to end."""
        self._left.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def begin(
        self, function: Callable[Concatenate[GoOn, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Callable[[], T]:
        """Return what gives the function's result, or raises what it raised.

        Args:
            function: first takes what it calls now and then, which raises once the block is left.
            args: that it takes then.
            kwargs: likewise.
        """
        if self._pool is None:
            return functools.cache(lambda: function(self._go_on, *args, **kwargs))
        return self._pool.submit(function, self._go_on, *args, **kwargs).result

    def _go_on(self) -> None:
        if self._left.is_set():
            raise Interrupted("nobody waits for this any more.")
