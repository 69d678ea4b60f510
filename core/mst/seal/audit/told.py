"""What a worker in the jail tells: the command's own process writes it into the audit log."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Collection, Iterator
from typing import Any

from mst.seal.audit.command import record

# Of a line; those that workers write have a few hundred.
_MOST_BYTES = 1 << 16


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
    # Whoever took the worker over may write anything: the next line is taken all the same.
    with open(pipe, "rb") as lines:
        while line := lines.readline(_MOST_BYTES):
            with contextlib.suppress(ValueError, RecursionError):
                told = json.loads(line)
                event = told.pop("event", None) if isinstance(told, dict) else None
                if isinstance(event, str) and event in events:
                    record(event, **_facts(told, texts))


def _facts(told: dict[str, Any], texts: Collection[str]) -> dict[str, int | str]:
    return {
        name: value
        for name, value in told.items()
        if isinstance(value, int) or (isinstance(value, str) and name in texts)
    }
