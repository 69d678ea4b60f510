"""Whether a peer did the same work as mst: its losses beside those of mst, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from mst.bench.compare import LOSS_TOLERANCE
from mst.bench.results import DONE, Measured, with_notes


def with_parity(each: Measured, known: Mapping[str, Measured]) -> Measured:
    """Return a peer's row with how far its losses are off mst's; another as it is.

    Args:
        each: a row.
        known: all rows of the bench, by the cell's id.
    """
    if not each.cell.peer or each.status != DONE:
        return each
    own = known.get(replace(each.cell, peer="").id)
    if own is None or own.status != DONE:
        return with_notes(each, "mst's own row is not done, so its losses can't be held beside it")
    off = loss_difference(each, own)
    if off is None:
        return with_notes(each, "mst's row has no losses of each step: measure it again")
    if not math.isfinite(off):
        return with_notes(each, "NO PARITY: a step's loss is no number")
    each = replace(each, loss_difference=off)
    if off <= LOSS_TOLERANCE * _largest(own):
        return with_notes(each, f"parity: each step's loss is within {off:.4f} of mst's")
    return with_notes(
        each, f"NO PARITY: a step's loss is {off:.4f} off mst's, so this may be other work"
    )


def loss_difference(one: Measured, other: Measured) -> float | None:
    """Return by how much losses of the same step differ at the most; None without losses.

    Of each the first repeat counts: all begin with the same seed.
    """
    pairs = list(zip(one.repeats[0].losses, other.repeats[0].losses, strict=False))
    if not pairs:
        return None
    # `max` would pass over a loss that is no number.
    off = [abs(a - b) if math.isfinite(a - b) else math.inf for a, b in pairs]
    return round(max(off), 6)


def _largest(each: Measured) -> float:
    return max(map(abs, each.repeats[0].losses))
