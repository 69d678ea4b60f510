"""What a worker in the jail tells: the command's own process writes it into the audit log."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Collection, Iterator

from mst.seal.audit.command import record


@contextlib.contextmanager
def recording(events: Collection[str], texts: Collection[str] = ()) -> Iterator[int]:
    """Yield the writing end of a pipe that takes lines of JSON, each with its "event".

    Args:
        events: that are recorded; others are dropped.
        texts: names of facts that may be texts; beside them numbers alone are recorded.
    """
    reading, writing = os.pipe()
    taking = threading.Thread(target=_take, args=(reading, events, texts), daemon=True)
    taking.start()
    try:
        yield writing
    finally:
        os.close(writing)
        taking.join()


def _take(pipe: int, events: Collection[str], texts: Collection[str]) -> None:
    with open(pipe, encoding="utf-8") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                event = told.pop("event", "")
                if event in events:
                    facts = {
                        str(name): value
                        for name, value in told.items()
                        if isinstance(value, int) or name in texts
                    }
                    record(event, **facts)
