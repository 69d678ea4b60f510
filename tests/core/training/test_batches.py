"""Order, packing and padding of micro-batches."""

from __future__ import annotations

import pytest

from mst.data.encode import Example
from mst.training.batches import (
    KEPT_MULTIPLE,
    TOKENS_MULTIPLE,
    collate,
    epoch_order,
    step_micro_batches,
)


def test_the_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(8, 42, 0) == (2, 6, 7, 5, 0, 1, 3, 4)


def test_epochs_and_seeds_differ() -> None:
    assert len({epoch_order(50, seed, epoch) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(("rows", "batch", "accumulation"), [(10, 2, 2), (7, 3, 2), (1, 4, 4)])
def test_an_epoch_visits_every_row_once(rows: int, batch: int, accumulation: int) -> None:
    steps = -(-rows // (batch * accumulation))
    seen = [
        row
        for step in range(steps)
        for micro in step_micro_batches(rows, step, batch, batch * accumulation, seed=3)
        for row in micro
    ]

    assert sorted(seen) == list(range(rows))


def test_accumulation_cuts_the_same_rows_smaller() -> None:
    whole = step_micro_batches(20, 1, 8, 8, seed=0)
    cut = step_micro_batches(20, 1, 2, 8, seed=0)

    assert whole[0] == tuple(row for micro in cut for row in micro)


@pytest.mark.parametrize("packing", [True, False])
def test_every_label_is_kept_once_and_shapes_are_rounded(
    examples: list[Example], packing: bool
) -> None:
    batch = collate(examples, pad_token_id=0, packing=packing)
    wanted = sorted(label for each in examples for label in each.labels if label != -100)

    assert sorted(batch.targets[batch.targets != -100].tolist()) == wanted
    assert batch.label_tokens == len(wanted)
    assert batch.tokens == sum(len(each.input_ids) for each in examples)
    assert batch.input_ids.shape[1] % (TOKENS_MULTIPLE if packing else KEPT_MULTIPLE) == 0
    assert len(batch.keep) % KEPT_MULTIPLE == 0


def test_a_packed_batch_has_no_mask_and_restarts_positions(examples: list[Example]) -> None:
    batch = collate(examples[:2], pad_token_id=0, packing=True)

    assert batch.attention_mask is None
    assert batch.position_ids[0, :26].tolist() == [*range(7), *range(19)]
