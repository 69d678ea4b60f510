"""The encoded rows as the planner sees them: how many, how long, and how large a step gets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from mst.memory import StepShape
from mst.request import TrainRequest
from mst.training.batches import batch_shape, is_packed, step_micro_batches

# Micro-batches of so many rows at the most are looked at for the largest; epochs only repeat it.
ROWS_LOOKED_AT = 300_000


@dataclass(frozen=True)
class DataFacts:
    """What the planner needs to know of the encoded rows.

    Attributes:
        lengths: tokens of each training row.
        label_tokens: of these, how many carry loss.
        val_rows: rows held out.
        answers: distinct answers when the set is a classification, else None.
        max_length: longest row that was accepted.
        longest: longest row that was found, accepted or not.
        deleted: rows left out because they were longer.
    """

    lengths: tuple[int, ...]
    label_tokens: tuple[int, ...]
    val_rows: int
    answers: int | None
    max_length: int
    longest: int
    deleted: int


def mean_length(data: DataFacts) -> float:
    """Return the tokens of an average row."""
    return sum(data.lengths) / len(data.lengths)


def total_steps(request: TrainRequest, rows: int, global_batch: int) -> int:
    """Return the optimizer steps of the whole run."""
    steps = math.ceil(request.num_train_epochs * math.ceil(rows / global_batch))
    return request.max_steps if request.max_steps is not None else max(1, steps)


def largest_step(
    data: DataFacts, micro_batch: int, global_batch: int, seed: int, steps: int
) -> StepShape:
    """Return the largest micro-batch that the run will meet: the order is known beforehand."""
    per_epoch = -(-len(data.lengths) // global_batch)
    tokens = labels = mask = height = width = 0
    masked = False
    # Past a few epochs the largest meeting of long rows has been seen; it only creeps up.
    for step in range(min(steps, 3 * per_epoch, max(1, ROWS_LOOKED_AT // global_batch))):
        batches = step_micro_batches(len(data.lengths), step, micro_batch, global_batch, seed)
        for rows in batches:
            lengths = [data.lengths[i] for i in rows]
            high, wide = batch_shape(lengths, packing=True)
            if (high * wide, wide) > (tokens, width):
                tokens, height, width = high * wide, high, wide
            packed = is_packed(lengths, packing=True)
            mask = max(mask, wide * wide if packed else 0)
            # As `collate` decides: a lone row needs no mask.
            masked = masked or (not packed and high > 1 and min(lengths) < wide)
            labels = max(labels, sum(data.label_tokens[i] for i in rows))
    return StepShape(tokens, labels, mask, height, width, masked=masked)


def step_shapes(data: DataFacts, request: TrainRequest) -> Callable[[int, int], StepShape]:
    """Return `largest_step` as a function of micro-batch and global batch that remembers."""

    @lru_cache(maxsize=64)
    def shape(micro_batch: int, global_batch: int) -> StepShape:
        steps = total_steps(request, len(data.lengths), global_batch)
        return largest_step(data, micro_batch, global_batch, request.seed, steps)

    return shape
