"""Which rows meet in which micro-batch, as a pure function of the seed: resume needs no state."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from mst.data.permutation import permuted
from mst.training.batches import Layout
from mst.training.packing import by_length, even_shares, first_fit_decreasing

if TYPE_CHECKING:
    from mst.data.encode import Example


# Returns shares of a step's rows, or blocks of rows, by their places; none of more than a number.
Arrange = Callable[[Sequence[tuple[int, ...]], int], list[list[int]]]


@dataclass(frozen=True, eq=False)
class RowSizes:
    """How large each training row is; equal to itself alone, so that results can be remembered.

    Attributes:
        tokens: of each row, or what grows with them.
        block: `--packing` fills blocks of so many tokens, and they count as rows; else None.
        streamed: the order takes no memory, and rows of no tokens are left out of their step.
    """

    tokens: Sequence[int]
    block: int | None = None
    streamed: bool = False


def row_sizes(examples: Sequence[Example], block: int | None) -> RowSizes:
    """Return the sizes of encoded rows; a preference counts with both conversations."""
    from mst.data.streaming import StreamedRows, StreamedSizes, row_tokens

    if isinstance(examples, StreamedRows):
        return RowSizes(StreamedSizes(examples), streamed=True)
    return RowSizes(array("I", map(row_tokens, examples)), block)


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> array[int]:
    """Return the order in which an epoch visits `rows` rows, in 4 bytes a row.

    `random.Random(str)` seeds through SHA-512 and does not depend on the interpreter's hash seed,
    so every machine and Python version gets the same order.
    """
    order = array("I", range(rows))
    random.Random(f"mst:{seed}:{epoch}").shuffle(order)
    return order


@lru_cache(maxsize=2)
def epoch_blocks(sizes: RowSizes, seed: int, epoch: int) -> tuple[tuple[int, ...], ...]:
    """Return the blocks of an epoch in the order of their visit, each with its rows' indices.

    The lengths alone decide how many blocks there are and which lengths meet in one, so every
    epoch has as many. Which of the rows of one length lies where differs between epochs.
    """
    assert sizes.block is not None
    order = epoch_order(len(sizes.tokens), seed, epoch)
    blocks = [tuple(each) for each in first_fit_decreasing(sizes.tokens, sizes.block, order)]
    random.Random(f"mst:blocks:{seed}:{epoch}").shuffle(blocks)
    return tuple(blocks)


def step_rows(
    sizes: RowSizes, step: int, global_batch: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Return the rows, or blocks of rows, that optimizer step `step` holds, counted from 0.

    Args:
        sizes: of the training rows.
        step: optimizer step, from 0.
        global_batch: rows or blocks a step, on all devices; the last step of an epoch holds what
            is left.
        seed: of the order.
    """
    blocks = sizes.block is not None
    count = len(epoch_blocks(sizes, seed, 0)) if blocks else len(sizes.tokens)
    epoch, index = divmod(step, -(-count // global_batch))
    part = slice(index * global_batch, (index + 1) * global_batch)
    if blocks:
        return epoch_blocks(sizes, seed, epoch)[part]
    if sizes.streamed:
        key = f"mst:{seed}:{epoch}"
        places = range(*part.indices(count))
        return _with_tokens(sizes, [permuted(place, count, key) for place in places])
    return tuple((row,) for row in epoch_order(count, seed, epoch)[part])


def _with_tokens(sizes: RowSizes, rows: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the rows that have tokens; where none has, the next that has stands in for all."""
    found = [row for row in rows if sizes.tokens[row]]
    if not found:
        count = len(sizes.tokens)
        others = ((rows[0] + further) % count for further in range(1, count))
        found = [next(row for row in others if sizes.tokens[row])]
    return tuple((row,) for row in found)


def step_micro_batches(
    sizes: RowSizes,
    step: int,
    micro_batch: int,
    global_batch: int,
    seed: int,
    layout: Layout,
    arrange: Arrange | None = None,
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Return the micro-batches of optimizer step `step`, each as rows or blocks of rows.

    Which rows a step holds depends on the global batch alone; the micro-batch and the layout only
    say which of them meet: even shares of the tokens where rows can be packed, so that the largest
    is small and devices finish together; rows of like lengths where they are padded.

    Args:
        sizes: of the training rows.
        step: optimizer step, from 0.
        micro_batch: rows or blocks a micro-batch, at most.
        global_batch: those of a step.
        seed: of the order.
        layout: of the micro-batches.
        arrange: which rows meet, instead of this.
    """
    chosen = step_rows(sizes, step, global_batch, seed)
    if arrange is not None:
        arranged = arrange(chosen, micro_batch)
    else:
        tokens = [sum(sizes.tokens[row] for row in rows) for rows in chosen]
        arranged = (by_length if layout == "padded" else even_shares)(tokens, micro_batch)
    return tuple(tuple(chosen[place] for place in each) for each in arranged)
