"""How attention in blocks cuts a line, and how many keys its blocks meet; plans ask too."""

from __future__ import annotations

import math

from mst.training.batches import rounded

# Queries of a block, and of long lines, whose blocks see many keys of others' too.
BLOCK = 64
LONG_BLOCK, LONG = 128, 2048
QUERIES_MULTIPLE = 16


def blocks_of(length: int) -> tuple[int, int]:
    """Return the queries of a block, and how many blocks a line of this length has."""
    count = -(-length // _largest(length))
    return rounded(-(-length // count), QUERIES_MULTIPLE), count


def keys_met(row_tokens: float, width: float) -> float:
    """Return the keys that a query is multiplied by, on average over a line.

    A block's queries meet all keys that any of them sees: from the beginning of the row in which
    the first one lies to the last one.

    Args:
        row_tokens: of each of the rows that lie end to end in the line.
        width: of the line; where it is narrower than a row, the row's beginning is in it.
    """
    size = _largest(row_tokens)
    met = 0.0
    for number in range(math.ceil(width / size)):
        start, end = number * size, min((number + 1) * size, width)
        met += (end - start) * (end - start // row_tokens * row_tokens)
    return met / width


def _largest(length: float) -> int:
    return BLOCK if length < LONG else LONG_BLOCK
