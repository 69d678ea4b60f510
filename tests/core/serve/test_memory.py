"""What a server holds in memory: what is used, and little beside."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from tests.core.serve.conftest import CPU

from mst.serve.job import prepare_engine
from mst.serve.loading import _prefix_bytes, load_served
from mst.serve.slots import zeros


def resident_bytes() -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)

    assert found is not None
    return int(found[1]) * 1024


def test_room_to_grow_takes_memory_once_it_is_used() -> None:
    shape, like = (64, 4, 4096, 64), torch.zeros(1, dtype=torch.bfloat16)
    before = resident_bytes()
    room = zeros(like, shape)
    made = resident_bytes() - before
    room[:16] = 1
    used = resident_bytes() - before
    ones = int((room[15:17] != 0).sum())
    del room
    freed = resident_bytes() - before

    assert made < 4 << 20
    assert used >= 30 << 20
    assert ones == 4 * 4096 * 64
    assert freed < 16 << 20
    assert zeros(like, (0, 4, 64, 64)).shape == (0, 4, 64, 64)


def test_what_is_kept_for_later_prompts_follows_the_models_size(tiny_model: Path) -> None:
    job = replace(prepare_engine(str(tiny_model), "cpu", os.environ), dtype="float32")
    served = load_served(job, CPU)
    weights = sum(each.nbytes for each in served.model.parameters())

    assert job.prefix_bytes is None
    assert _prefix_bytes(job, served) == weights // 4
    assert _prefix_bytes(replace(job, prefix_bytes=7), served) == 7
