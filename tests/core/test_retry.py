"""The next smaller plan after one that did not fit, and the kernel's count of its victims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.reference_models import LLAMA_2_7B

from mst.attempts import oom_kills
from mst.facts import Capabilities, DeviceFacts
from mst.plan import Plan
from mst.planner import plan
from mst.request import TrainRequest
from mst.retry import next_smaller
from mst.workload import DataFacts

A100 = DeviceFacts("cuda", 0, "A100", "sm80", 80 * 2**30, 80 * 2**30, ("bfloat16", "float32"))
CUDA = Capabilities("cuda", "nccl", attention=("sdpa",))
ROWS = DataFacts((1024,) * 64, (300,) * 64, 0, None, 1024, 1024, 0)


def planned(request: TrainRequest) -> Plan:
    return plan("cuda", (A100,), (CUDA,), {}, LLAMA_2_7B, ROWS, request)


def test_the_next_smaller_plan_keeps_the_global_batch_and_what_is_trained() -> None:
    request = TrainRequest(gradient_checkpointing="off", per_device_train_batch_size=4)
    failed = planned(request)
    smaller = next_smaller(failed, LLAMA_2_7B, ROWS, request)

    assert smaller is not None
    assert smaller.per_device_train_batch_size < 4
    assert smaller.global_batch == failed.global_batch
    assert smaller.memory.peak_bytes < failed.memory.peak_bytes
    kept = ("tuner", "compute_dtype", "weights_dtype", "strategy", "total_steps", "torch_devices")
    assert [getattr(smaller, each) for each in kept] == [getattr(failed, each) for each in kept]
    assert any("the plan before needed more" in each.why for each in smaller.reasons)


def test_checkpointing_comes_when_the_micro_batch_is_one_row() -> None:
    request = TrainRequest(gradient_checkpointing="off", per_device_train_batch_size=1)
    smaller = next_smaller(planned(request), LLAMA_2_7B, ROWS, request)

    assert smaller is not None
    assert smaller.gradient_checkpointing


def test_the_smallest_plan_has_no_next_one() -> None:
    request = TrainRequest(gradient_checkpointing="on", per_device_train_batch_size=1)

    assert next_smaller(planned(request), LLAMA_2_7B, ROWS, request) is None


def test_plans_get_smaller_until_there_is_none() -> None:
    request = TrainRequest()
    found: Plan | None = replace(planned(request), gradient_checkpointing=False)
    peaks = []
    while found is not None:
        peaks.append(found.memory.peak_bytes)
        found = next_smaller(found, LLAMA_2_7B, ROWS, request)

    assert 2 <= len(peaks) < 12
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(
    ("vmstat", "events", "kills"),
    [
        ("pgfault 7\noom_kill 2\n", "low 0\noom 1\noom_kill 1\n", 3),
        ("pgfault 7\noom_kill 2\n", None, 2),
        (None, None, 0),
    ],
)
def test_the_kernels_victims_are_counted(
    tmp_path: Path, vmstat: str | None, events: str | None, kills: int
) -> None:
    for name, text in (("proc/vmstat", vmstat), ("sys/fs/cgroup/memory.events", events)):
        if text is not None:
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text(text)

    assert oom_kills(tmp_path) == kills
