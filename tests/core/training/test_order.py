"""Which rows meet in which micro-batch."""

from __future__ import annotations

import itertools
import random

import pytest

from mst.training.batches import Layout
from mst.training.order import RowSizes, epoch_blocks, epoch_order, step_micro_batches, step_rows

DRAW = random.Random(1)
LENGTHS = [DRAW.randrange(5, 200) for _ in range(500)]


def test_the_order_is_the_same_on_every_machine() -> None:
    assert tuple(epoch_order(8, 42, 0)) == (2, 6, 7, 5, 0, 1, 3, 4)


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}

    assert len(orders) == 4


@pytest.mark.parametrize("layout", ["padded", "lines"])
@pytest.mark.parametrize(("rows", "batch", "accumulation"), [(10, 2, 2), (7, 3, 2), (1, 4, 4)])
def test_an_epoch_visits_every_row_once(
    rows: int, batch: int, accumulation: int, layout: Layout
) -> None:
    steps = -(-rows // (batch * accumulation))
    sizes = RowSizes(LENGTHS[:rows])
    seen = [
        row
        for step in range(steps)
        for micro in step_micro_batches(sizes, step, batch, batch * accumulation, 3, layout)
        for (row,) in micro
    ]

    assert sorted(seen) == list(range(rows))


@pytest.mark.parametrize("layout", ["padded", "lines"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_micro_batch_and_the_layout_do_not_change_which_rows_a_step_holds(
    micro_batch: int, layout: Layout
) -> None:
    sizes = RowSizes(LENGTHS)
    cut = step_micro_batches(sizes, 3, micro_batch, 8, 0, layout)

    assert sorted(item for micro in cut for item in micro) == sorted(step_rows(sizes, 3, 8, 0))
    assert [len(micro) for micro in cut] == [micro_batch] * (8 // micro_batch)


def test_padded_micro_batches_hold_rows_of_like_lengths() -> None:
    sizes = RowSizes(LENGTHS)
    micro = step_micro_batches(sizes, 0, 4, 16, 0, "padded")
    ranges = [[LENGTHS[row] for (row,) in each] for each in micro]

    assert all(min(one) >= max(other) for one, other in itertools.pairwise(ranges))


def test_packed_micro_batches_have_nearly_the_same_tokens() -> None:
    sizes = RowSizes(LENGTHS)
    order = [row for (row,) in step_rows(sizes, 0, 16, 0)]
    as_they_come = [sum(LENGTHS[row] for row in order[i : i + 4]) for i in range(0, 16, 4)]
    micro = step_micro_batches(sizes, 0, 4, 16, 0, "lines")
    arranged = [sum(LENGTHS[row] for (row,) in each) for each in micro]

    assert max(arranged) - min(arranged) < (max(as_they_come) - min(as_they_come)) / 4


def test_every_epoch_has_as_many_blocks_and_other_rows_meet_in_them() -> None:
    sizes = RowSizes(LENGTHS, 256)
    epochs = [epoch_blocks(sizes, 7, epoch) for epoch in (0, 1)]

    assert len(epochs[0]) == len(epochs[1])
    assert {frozenset(each) for each in epochs[0]} != {frozenset(each) for each in epochs[1]}
    for blocks in epochs:
        assert sorted(row for rows in blocks for row in rows) == list(range(500))
        assert max(sum(LENGTHS[row] for row in rows) for rows in blocks) <= 256


def test_steps_of_blocks_visit_every_row_once() -> None:
    sizes = RowSizes(LENGTHS, 256)
    steps = -(-len(epoch_blocks(sizes, 0, 0)) // 8)
    seen = [row for step in range(steps) for rows in step_rows(sizes, step, 8, 0) for row in rows]

    assert sorted(seen) == list(range(500))
