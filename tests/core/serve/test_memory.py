"""What a server holds in memory: what is used, and little beside."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.serve.conftest import CPU

from mst.serve.job import prepare_engine
from mst.serve.loading import limits_of, load_served
from mst.serve.pages import Block, copies
from mst.serve.slots import Slots
from mst.training.faults import is_out_of_memory


def resident_bytes() -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)

    assert found is not None
    return int(found[1]) * 1024


def test_room_to_grow_takes_memory_once_it_is_used() -> None:
    shape, like = (64, 4, 4096, 64), torch.zeros(1, dtype=torch.bfloat16)
    before = resident_bytes()
    room = Block(like, shape)
    made = resident_bytes() - before
    room.tensor[:16] = 1
    used = resident_bytes() - before
    ones = int((room.tensor[15:17] != 0).sum())
    del room
    freed = resident_bytes() - before

    assert made < 4 << 20
    assert used >= 30 << 20
    assert ones == 4 * 4096 * 64
    assert freed < 16 << 20
    assert Block(like, (0, 4, 64, 64)).tensor.shape == (0, 4, 64, 64)


@pytest.mark.parametrize("columns", [64, 1000])
def test_a_row_that_is_cleared_is_zeros_and_takes_no_memory(columns: int) -> None:
    block = Block(torch.zeros(1), (8, 16, columns, 64))
    block.tensor.fill_(1)
    before = resident_bytes()
    for row in (2, 3, 4, 7):
        block.clear(row)
    given_back = before - resident_bytes()
    sums = block.tensor.sum((1, 2, 3)).tolist()

    whole = 16 * columns * 64
    assert sums == [whole, whole, 0, 0, 0, whole, whole, 0]
    if columns == 1000:
        assert given_back > 14 << 20


def test_copies_are_equal_and_leave_with_the_last() -> None:
    parts = [torch.randn(40, 1000), torch.randn(3, 7).T, torch.zeros(0, 5), torch.arange(9)]
    made = copies([*parts, torch.ones(8 << 20, dtype=torch.bfloat16)])
    before = resident_bytes()
    found = [torch.equal(*pair) for pair in zip(parts, made, strict=False)]
    del made

    assert found == [True] * 4
    assert before - resident_bytes() > 14 << 20
    assert [each.dtype for each in copies(parts)] == [each.dtype for each in parts]


def test_memory_that_the_system_has_not_is_told_as_torch_tells_it() -> None:
    # More than an address has bits for.
    with pytest.raises(torch.OutOfMemoryError, match="can't be mapped") as caught:
        Block(torch.zeros(1), (1 << 52,))

    assert is_out_of_memory(caught.value)


def test_answers_that_leave_take_their_memory_with_them(llama: Any) -> None:
    slots, rows = Slots(llama), 8
    size, heads, tokens = 64, 32, 512
    keys = torch.ones(heads, tokens, size)
    long, short = {0: (keys, keys), 1: (keys, keys)}, {0: (keys * 2, keys), 1: (keys, keys)}
    for _ in range(rows):
        slots.add(long, tokens)
    full = resident_bytes()
    slots.remove(0)
    slots.add(short, tokens - 100)
    for row in (5, 0, 1, 2, 0):
        slots.remove(row)
    given_back = full - resident_bytes()
    left = [float(each.sum()) for each in slots.columns()[0][0]]
    slots.reserve(200)
    moved = [float(each.sum()) for each in slots.columns()[0][0]]

    a_row = 2 * 2 * heads * tokens * size * 4
    assert given_back > 4 * a_row
    assert slots.lengths == [tokens, tokens - 100, tokens]
    assert left == [heads * size * each for each in (tokens, 2 * (tokens - 100), tokens)]
    assert moved == left


def test_what_is_kept_for_later_prompts_follows_the_models_size(tiny_model: Path) -> None:
    job = replace(prepare_engine(str(tiny_model), "cpu", os.environ), dtype="float32")
    served = load_served(job, CPU)
    weights = sum(each.nbytes for each in served.model.parameters())

    found, asked = limits_of(job, served), limits_of(replace(job, prefix_bytes=7), served)

    assert job.prefix_bytes is None
    assert (found.prefix_bytes, found.together_bytes) == (weights // 4, weights // 4 * 5 // 4)
    assert (asked.prefix_bytes, asked.together_bytes) == (7, None)
    assert found.batch == asked.batch == job.batch
