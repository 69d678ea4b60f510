"""Examples that are longer than the limit: left out, cut, or divided."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mst.data.encode import Example

TRUNCATION_STRATEGIES = ("delete", "right", "left")


def fitting(example: Example, max_length: int | None, strategy: str) -> list[Example]:
    """Return what of an example is kept: itself, what was cut of it, its pieces, or nothing.

    Plain text is divided, since no part of it needs another. Of a preference both conversations
    must be kept.

    Args:
        example: one row, whole.
        max_length: most tokens; None for no limit.
        strategy: of `TRUNCATION_STRATEGIES`.
    """
    if max_length is None or length(example) <= max_length:
        return [example]
    if example.row.text is not None:
        starts = range(0, len(example.input_ids), max_length)
        pieces = (_part(example, start, start + max_length) for start in starts)
        return [piece for piece in pieces if _carries_loss(piece)]
    if strategy == "delete" or example.images:  # an image has no part that the model could see
        return []
    kept = _cut(example, max_length, strategy)
    if example.rejected is not None:
        kept = replace(kept, rejected=_cut(example.rejected, max_length, strategy))
    sides = [kept, *([kept.rejected] if kept.rejected is not None else [])]
    return [kept] if all(map(_carries_loss, sides)) else []


def length(example: Example) -> int:
    """Return the tokens of an example; of a preference those of its longer conversation."""
    worse = example.rejected
    return max(len(example.input_ids), 0 if worse is None else len(worse.input_ids))


def _cut(example: Example, max_length: int, strategy: str) -> Example:
    if strategy == "right":
        return _part(example, 0, max_length)
    return _part(example, max(0, len(example.input_ids) - max_length), len(example.input_ids))


def _part(example: Example, start: int, end: int) -> Example:
    from mst.data.encode import without_first

    weights = example.weights
    return replace(
        example,
        input_ids=example.input_ids[start:end],
        labels=without_first(example.labels[start:end]),
        weights=None if weights is None else weights[start:end],
    )


def _carries_loss(example: Example) -> bool:
    from mst.data.encode import IGNORE

    return example.labels.count(IGNORE) < len(example.labels)
