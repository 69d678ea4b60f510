"""Liger's kernels are planned where they are installed and were verified, and why not elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.reference_models import SMOLLM2_135M

from mst.errors import PlanError
from mst.explicit import as_explicit
from mst.facts import Capabilities, DeviceFacts
from mst.plan import Plan, Reason
from mst.planner import plan
from mst.request import TrainRequest
from mst.workload import DataFacts

ROWS = DataFacts((300,) * 64, (40,) * 64, 8, None, 512, 512, 0)
MEMORY, DTYPES = 40 * 2**30, ("bfloat16", "float16", "float32")
A100 = DeviceFacts("cuda", 0, "NVIDIA A100-SXM4-40GB", "sm80", MEMORY, MEMORY, DTYPES, 108)
ABLE = Capabilities("cuda", "nccl", ("single", "ddp", "zero3"), attention=("sdpa",), liger=True)


def planned(
    request: TrainRequest, able: Capabilities = ABLE, kind: str = "llama", devices: int = 1
) -> Plan:
    model = replace(SMOLLM2_135M, model_type=kind)
    cards = tuple(replace(A100, index=index) for index in range(devices))
    return plan("cuda", cards, (able,) * devices, {}, model, ROWS, request, 2**36)


def why(found: Plan) -> Reason | None:
    return next((each for each in found.reasons if each.choice == "use_liger_kernel"), None)


def test_kernels_are_used_where_they_are_installed_and_kept_by_a_run_that_goes_on() -> None:
    found = planned(TrainRequest())
    reason = why(found)

    assert found.liger
    assert reason is not None
    assert reason.value == "on"
    assert "gradients are compared before the first step" in reason.why
    assert as_explicit(TrainRequest(), found).use_liger_kernel == "on"


def test_a_plan_without_them_is_the_same_but_for_them() -> None:
    without = planned(TrainRequest(use_liger_kernel="off"))

    assert not without.liger
    assert why(without) is None
    assert without.memory == planned(TrainRequest()).memory
    assert as_explicit(TrainRequest(), without).use_liger_kernel == "off"


def test_nothing_is_said_of_devices_that_they_are_not_made_for() -> None:
    found = planned(TrainRequest(), replace(ABLE, liger=False))

    assert not found.liger
    assert why(found) is None


@pytest.mark.parametrize(
    ("request_", "able", "kind", "devices", "says"),
    [
        (TrainRequest(), replace(ABLE, liger=False), "llama", 1, "needs the packages liger-kernel"),
        (
            TrainRequest(torch_compile="on"), replace(ABLE, compiler="triton"), "llama", 1,
            "the layers are compiled",
        ),
        (TrainRequest(dp_epsilon=8.0), ABLE, "llama", 1, "each row's gradient is taken by itself"),
        (TrainRequest(deepspeed="zero3"), ABLE, "llama", 2, "no device holds the whole model"),
    ],
)  # fmt: skip
def test_what_stands_against_them_is_said(
    request_: TrainRequest, able: Capabilities, kind: str, devices: int, says: str
) -> None:
    with pytest.raises(PlanError, match=f"--use-liger-kernel on was asked for: .*{says}"):
        planned(replace(request_, use_liger_kernel="on"), able, kind, devices)
    found = planned(request_, able, kind, devices)
    reason = why(found)

    assert not found.liger
    assert reason is None if not able.liger else reason is not None and says in reason.why


def test_other_architectures_are_left_alone_unless_they_are_asked_for() -> None:
    found = planned(TrainRequest(), kind="nobodys")
    reason = why(found)

    assert not found.liger
    assert reason is not None
    assert "not verified for nobodys" in reason.why
    assert planned(TrainRequest(use_liger_kernel="on"), kind="nobodys").liger
