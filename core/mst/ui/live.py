"""A run while it goes on: what is new in its curves is sent to the page as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from mst.serve.http.wire import Events, Exchange
from mst.ui.detail import row
from mst.ui.index import Entry, Index
from mst.ui.tails import Grown, Tails

# Points of a curve that are sent; a phone's screen has fewer columns, a desktop's chart about as
# many.
POINTS = 1200
# Between two looks at the file. Each that finds something has the browser draw four charts, mostly
# on the processors that train: every two seconds that took 1.4 % of two cores.
_LOOK_SECONDS = 5.0
# A line that says nothing, so that a connection that has died is noticed.
_ALIVE_SECONDS = 15.0


class Watched(Protocol):
    """What is known of runs, and whether the server ends."""

    index: Index
    tails: Tails
    service: Any


def told(entry: Entry, grown: Grown) -> dict[str, Any]:
    """Return a run with points of its curves, as the page takes them."""
    return {
        "run": row(entry),
        "generation": grown.generation,
        "damaged": grown.damaged,
        "points": grown.points,
    }


async def follow(
    exchange: Exchange, watched: Watched, entry: Entry, inside: Callable[[], bool]
) -> None:
    """Send a run's curves, then what comes to them, until the run or the server is gone.

    Args:
        exchange: the request.
        watched: of the server.
        entry: the run.
        inside: returns whether who looks may still do so.
    """
    events = exchange.events = Events(exchange)
    tail = watched.tails.of(entry.path)
    await asyncio.to_thread(tail.read)
    grown = tail.whole(POINTS)
    await events.send({**told(entry, grown), "whole": True})
    sent, said = row(entry), time.monotonic()
    while not watched.service.stopping:
        await asyncio.sleep(_LOOK_SECONDS)
        if not inside():
            break
        found = await asyncio.to_thread(watched.index.find, entry.id)
        if found is None:
            await events.send({"gone": True})
            break
        changed = found.metrics != entry.metrics
        entry = found
        if changed:
            await asyncio.to_thread(tail.read)
        now, new = row(entry), tail.since(grown, POINTS)
        whole = new.generation != grown.generation
        if whole or new.points or now != sent:
            await events.send({**told(entry, new), "whole": whole})
            grown, sent, said = new, now, time.monotonic()
        elif time.monotonic() - said > _ALIVE_SECONDS:
            await events.send({"alive": True})
            said = time.monotonic()
    await events.end()
