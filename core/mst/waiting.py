"""What goes on, for those who wait: a moving line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Without a terminal: what is over sooner is told by its result, and a log stays short.
_SILENT_SECONDS = 10.0


@contextlib.contextmanager
def told_while(console: Console, doing: str) -> Iterator[Callable[[str], None]]:
    """Say what is done in here; yield a function that takes how far it has come, as often as known.

    Args:
        console: a terminal's, or one that writes to a file, as of work in the background.
        doing: what begins.
    """
    if console.is_terminal:
        with console.status(doing) as status:
            yield status.update
        return
    said = time.monotonic()

    def tell(text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= _SILENT_SECONDS:
            said = time.monotonic()
            console.print(f"{text} …")

    yield tell
