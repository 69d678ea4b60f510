"""Which plan published models get on hardware that people have."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from tests.reference_models import LLAMA_2_7B, LLAMA_2_13B, LLAMA_3_70B, QWEN_2_5_32B
from tests.reference_plans import planned, rows

from mst.errors import PlanError
from mst.plan import Plan
from mst.request import TrainRequest

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


def why(plan: Plan, choice: str) -> str:
    return next(each.why for each in plan.reasons if each.choice == choice)


def test_a_3090_gets_lora_or_qlora_for_7b_by_length() -> None:
    short = planned(LLAMA_2_7B, "rtx-3090", data=rows(256))
    long = planned(LLAMA_2_7B, "rtx-3090", data=rows(4096))

    assert (short.tuner, short.gradient_checkpointing) == ("lora", False)
    assert long.tuner in ("qlora", "lora")
    assert long.tuner == "qlora" or long.gradient_checkpointing
    assert long.memory.peak_bytes <= 0.9 * 24 * GIB


def test_a_3090_gets_qlora_for_13b_because_lora_does_not_fit() -> None:
    made = planned(LLAMA_2_13B, "rtx-3090")

    assert (made.tuner, made.quantization, made.strategy) == ("qlora", "nf4", "single")
    assert "lora needs" in why(made, "tuner")
    assert "short" in why(made, "tuner")


def test_70b_on_one_3090_is_refused_with_the_size_of_its_weights() -> None:
    with pytest.raises(PlanError) as found:
        planned(LLAMA_3_70B, "rtx-3090")

    text = str(found.value)
    assert "The NF4 weights alone take 36" in text
    assert "21.17 GiB may be used" in text
    assert text.count("; or ") == 2
    assert "RTX 3090 (" in text


@pytest.mark.parametrize(
    ("on", "tuner", "quantization", "dtype"),
    [
        ("a100-40gb", "lora", "none", "bfloat16"),
        ("a100-80gb", "lora", "none", "bfloat16"),
        ("h200", "lora", "none", "bfloat16"),
        ("910a:8", "lora", "none", "float16"),
        ("910b2:8", "lora", "none", "bfloat16"),
        ("cpu-16c-64gb", "lora", "none", "float32"),
    ],
)
def test_7b_gets_lora_where_it_fits(on: str, tuner: str, quantization: str, dtype: str) -> None:
    made = planned(LLAMA_2_7B, on)

    assert (made.tuner, made.quantization, made.compute_dtype) == (tuner, quantization, dtype)


@pytest.mark.parametrize(("on", "count"), [("a100-80gb:4", 4), ("a100-80gb:8", 8), ("910a:8", 8)])
def test_all_devices_are_used_when_that_is_faster(on: str, count: int) -> None:
    made = planned(LLAMA_2_7B, on)

    assert (made.strategy, len(made.torch_devices)) == ("ddp", count)
    assert made.global_batch == 16
    assert "on 4 devices would take" in why(made, "strategy") or count == 4


def test_70b_on_four_a100_gets_the_faster_of_zero3_lora_and_qlora_ddp() -> None:
    made = planned(LLAMA_3_70B, "a100-80gb:4")
    sharded = planned(LLAMA_3_70B, "a100-80gb:4", TrainRequest(tuner="lora"))
    quantized = planned(LLAMA_3_70B, "a100-80gb:4", TrainRequest(tuner="qlora"))

    assert sharded.strategy == "zero3"
    assert (quantized.strategy, quantized.quantization) == ("ddp", "nf4")
    assert made.time is not None
    assert sharded.time is not None
    assert quantized.time is not None
    faster = min(sharded.time.step_seconds, quantized.time.step_seconds)
    assert made.time.step_seconds <= 1.05 * faster


def test_full_tuning_of_7b_on_four_a100_shares_the_optimizer() -> None:
    made = planned(LLAMA_2_7B, "a100-80gb:4", TrainRequest(tuner="full"))

    assert made.strategy in ("zero2", "zero3")
    assert made.weights_dtype == "bfloat16"
    assert "ddp on 4 devices" in why(made, "strategy")


def test_full_tuning_of_7b_on_one_a100_offloads_when_the_host_is_large_enough() -> None:
    request = TrainRequest(tuner="full")
    made = planned(LLAMA_2_7B, "a100-80gb+cpu-32c-256gb", request)

    assert made.offload in ("optimizer", "parameters")
    assert made.memory.host_bytes > 50 * GIB
    with pytest.raises(PlanError, match="of memory free on the host"):
        planned(LLAMA_2_7B, "a100-80gb", request)


def test_an_ascend_910a_computes_in_float16_and_has_no_4_bit_weights() -> None:
    made = planned(LLAMA_2_13B, "910a:8")

    assert (made.compute_dtype, made.quantization) == ("float16", "none")
    with pytest.raises(PlanError, match=r"4-bit weights \(nf4\) were asked for; 910A offers none"):
        planned(LLAMA_2_7B, "910a", TrainRequest(tuner="qlora"))
    with pytest.raises(PlanError, match="--dtype bfloat16 was asked for; 910A trains in float16"):
        planned(LLAMA_2_7B, "910a", TrainRequest(dtype="bfloat16"))


def test_data_that_adapters_cannot_hold_asks_for_full_tuning() -> None:
    much = rows(4096, 40_000)
    made = planned(LLAMA_2_7B, "a100-80gb:8", data=much)
    kept = planned(LLAMA_2_7B, "rtx-3090", data=much)

    assert made.tuner == "full"
    assert "more than adapters of rank 8 can take up" in why(made, "tuner")
    assert kept.tuner != "full"
    assert any("--lora-rank" in each for each in kept.warnings)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (TrainRequest(tuner="full", quant_bits=4), "--quant-bits 4 freezes"),
        (TrainRequest(optim="adamw_8bit"), "--optim adamw_8bit was asked for; 910A offers"),
        (TrainRequest(tuner="full", gradient_checkpointing="off"), "--gradient-checkpointing on"),
    ],
)
def test_requests_that_no_plan_meets_are_answered(request_: TrainRequest, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        planned(LLAMA_2_13B, "910a", request_)


def test_every_plan_looked_at_is_kept_with_what_it_lacks() -> None:
    made = planned(QWEN_2_5_32B, "a100-80gb:4")

    assert {each.configuration.tuner for each in made.alternatives} == {"lora", "qlora", "full"}
    refused = [each for each in made.alternatives if each.why_not]
    assert refused
    assert all("GiB" in each.why_not for each in refused)
    first = made.alternatives[0]
    assert not first.why_not
    assert 0 < first.trained_share <= 1


def test_the_reference_table_of_the_docs_is_what_is_planned() -> None:
    script = runpy.run_path(str(ROOT / "ci" / "make_plan_table.py"))
    text = script["TARGET"].read_text(encoding="utf-8")

    assert script["document"](text) == text, "run: python ci/make_plan_table.py"
