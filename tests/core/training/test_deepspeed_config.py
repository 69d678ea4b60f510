"""DeepSpeed's configuration of a plan, and each way in which a user's file contradicts it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.core.training.conftest import tiny_plan

from mst.errors import PlanError
from mst.plan import Plan
from mst.request import TrainRequest
from mst.training.deepspeed_config import (
    completed,
    conflicts,
    deepspeed_config,
    read_config,
    stage_of,
)

REQUEST = TrainRequest(max_grad_norm=1.0)


@pytest.fixture
def plan(tiny_model: Path) -> Plan:
    """Two devices, ZeRO-2, bfloat16, micro-batches of 4 rows, 2 of them a step."""
    return tiny_plan(
        tiny_model, strategy="zero2", tuner="full", torch_devices=("cuda:0", "cuda:1"),
        per_device_train_batch_size=4, gradient_accumulation_steps=2, compute_dtype="bfloat16",
        weights_dtype="bfloat16",
    )  # fmt: skip


def changed(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, **changes)


def test_the_batch_arithmetic_and_the_dtype_are_the_plans(plan: Plan) -> None:
    config = deepspeed_config(plan, REQUEST)

    assert config["train_batch_size"] == 16
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] == 8
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["stage"] == 2
    assert all(
        isinstance(value, int)
        for name, value in config["zero_optimization"].items()
        if name.endswith("bucket_size")
    )


def test_adapters_stay_float32_and_go_through_autocast(plan: Plan) -> None:
    config = deepspeed_config(changed(plan, tuner="lora"), REQUEST)

    assert not config["bf16"]["enabled"]
    assert config["torch_autocast"]["dtype"] == "bfloat16"


def test_float16_starts_with_the_scale_of_our_own_loop(plan: Plan) -> None:
    config = deepspeed_config(changed(plan, compute_dtype="float16"), REQUEST)

    assert 2.0 ** config["fp16"]["initial_scale_power"] == 65536


@pytest.mark.parametrize(
    ("offload", "directory", "parts"),
    [
        ("none", None, {}),
        ("optimizer", None, {"offload_optimizer": "cpu"}),
        ("parameters", None, {"offload_optimizer": "cpu", "offload_param": "cpu"}),
        ("parameters", "/disk", {"offload_optimizer": "nvme", "offload_param": "nvme"}),
    ],
)
def test_what_is_offloaded_goes_where_the_plan_says(
    offload: str, directory: str | None, parts: dict[str, str], plan: Plan
) -> None:
    made = changed(plan, strategy="zero3", offload=offload, offload_dir=directory)
    section = deepspeed_config(made, REQUEST)["zero_optimization"]

    assert {k: v["device"] for k, v in section.items() if k.startswith("offload")} == parts


def test_an_8_bit_optimizer_is_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match="--optim adamw_8bit was asked for with --deepspeed zero2"):
        deepspeed_config(changed(plan, optim="adamw_8bit"), REQUEST)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bf16": {"enabled": False}}, "bf16 is off, but the plan computes in bfloat16"),
        ({"fp16": {"enabled": True}}, "fp16 is enabled, but the plan computes in bfloat16"),
        ({"train_batch_size": 32}, "4 rows x 2 micro-batches x 2 devices are 16"),
        ({"train_micro_batch_size_per_gpu": 8}, "--per-device-train-batch-size 8"),
        ({"gradient_accumulation_steps": 1}, "--gradient-accumulation-steps 1"),
        ({"gradient_clipping": 0.5}, "--max-grad-norm 0.5"),
        ({"zero_optimization": {"stage": 3}}, "stage is 3, the plan is zero2. Write 2."),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}, "Write 500000000"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer offloads to cpu, the plan's offload is none",
        ),
        ({"optimizer": {"type": "AdamW"}}, "optimizer: mst makes AdamW itself"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: mst sets the rate itself"),
        ({"wandb": {"enabled": True}}, "wandb: it reports to a host"),
    ],
)
def test_each_conflict_is_named_with_its_fix(
    change: dict[str, Any], words: str, plan: Plan
) -> None:
    found = conflicts({"zero_optimization": {"stage": 2}} | change, plan, REQUEST)

    assert len(found) == 1
    assert words in found[0]


def test_auto_is_filled_in_and_what_fits_is_kept(plan: Plan) -> None:
    theirs = {
        "train_batch_size": "auto", "bf16": {"enabled": "auto"}, "gradient_clipping": "auto",
        "wandb": {"enabled": False}, "communication_data_type": "fp32",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False},
    }  # fmt: skip
    config = completed(theirs, plan, REQUEST)

    assert config["train_batch_size"] == 16
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["reduce_bucket_size"] == 100_000_000
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["communication_data_type"] == "fp32"
    assert config["managed_gradient_accumulation"] is False
    assert "wandb" not in config


def test_our_own_configuration_contradicts_nothing(plan: Plan) -> None:
    for strategy in ("zero1", "zero2", "zero3"):
        made = changed(plan, strategy=strategy)

        assert conflicts(deepspeed_config(made, REQUEST), made, REQUEST) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not JSON"), ("[]", "holds no JSON object"), (None, "can't be read")],
)
def test_a_file_that_is_no_configuration_is_named(
    text: str | None, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)

    with pytest.raises(PlanError, match=words):
        read_config(file)


def test_the_stage_of_a_file_is_what_the_option_would_say() -> None:
    offload = {"stage": 3, "offload_param": {"device": "cpu"}}

    assert stage_of({"zero_optimization": {"stage": 2}}) == "zero2"
    assert stage_of({"zero_optimization": offload}) == "zero3_offload"
    with pytest.raises(PlanError, match="stage is None"):
        stage_of({})
