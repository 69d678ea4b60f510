"""Packing and padding of micro-batches."""

from __future__ import annotations

import pytest

from mst.data.encode import Example
from mst.training import batches
from mst.training.batches import (
    KEPT_MULTIPLE,
    TOKENS_MULTIPLE,
    Layout,
    collate,
    layout_of,
    lines_of,
)


@pytest.mark.parametrize("layout", ["padded", "line", "lines"])
@pytest.mark.parametrize("most", [1, 10**6])
def test_every_label_is_kept_once_and_shapes_are_rounded(
    examples: list[Example], layout: Layout, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ATTENTION_WIDTH", most)
    batch = collate(examples, pad_token_id=0, layout=layout)
    wanted = sorted(label for each in examples for label in each.labels if label != -100)

    assert sorted(batch.targets[batch.targets != -100].tolist()) == wanted
    assert batch.label_tokens == len(wanted)
    assert batch.tokens == sum(len(each.input_ids) for each in examples)
    assert (
        batch.input_ids.shape[1] % (KEPT_MULTIPLE if layout == "padded" else TOKENS_MULTIPLE) == 0
    )
    assert len(batch.keep) % KEPT_MULTIPLE == 0


def test_a_packed_batch_has_no_mask_and_restarts_positions(examples: list[Example]) -> None:
    batch = collate(examples[:2], pad_token_id=0, layout="line")

    assert batch.attention_mask is None
    assert batch.position_ids[0, :26].tolist() == [*range(7), *range(19)]


def test_rows_that_are_too_many_for_one_line_fill_lines_of_even_width() -> None:
    lengths = [2000, 100, 900, 1000, 50, 1900]
    lines = lines_of(lengths, "lines")

    assert sorted(row for line in lines for row in line) == list(range(6))
    assert len(lines) == 3
    assert max(sum(lengths[row] for row in line) for line in lines) <= 2048


def test_rows_of_one_length_are_not_laid_end_to_end_beyond_it() -> None:
    assert lines_of([1024] * 3, "lines") == [[0], [1], [2]]


def test_flash_attention_gets_one_line_and_other_models_get_padding() -> None:
    assert layout_of(True, "flash_attention_2") == "line"
    assert layout_of(True, "sdpa") == "lines"
    assert layout_of(False, "sdpa") == "padded"
    assert len(lines_of([2000, 2000], "line")) == 1
    assert lines_of([3, 4], "padded") == [[0], [1]]


def test_rows_alone_in_their_lines_need_no_mask(
    examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ATTENTION_WIDTH", 1)
    monkeypatch.setattr(batches, "TOKENS_MULTIPLE", 1)
    batch = collate([examples[3]] * 4, pad_token_id=0, layout="lines")

    assert batch.attention_mask is None
    assert batch.input_ids.shape == (4, 32)
    assert batch.position_ids[0].tolist() == list(range(32))
