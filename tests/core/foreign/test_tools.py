"""Each tool's settings come out as what mst would do the same with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mst.foreign.draft import Left
from mst.foreign.source import Source, read_source
from mst.foreign.translate import TOOLS, Translation, translate, which_tool
from mst.request import TrainRequest, fields

CONFIGS = Path(__file__).resolve().parents[2] / "data" / "configs"
# The keys by which each tool is told, with nothing that is learnt from them.
LEAST: dict[str, dict[str, Any]] = {
    "ms-swift": {"tuner_type": "lora"},
    "llama-factory": {"finetuning_type": "lora"},
    "axolotl": {"adapter": "lora", "lora_target_linear": True},
    "trl": {"use_peft": True},
}


def of_file(name: str) -> Translation:
    path = CONFIGS / name
    source = read_source(path)
    return translate(source, which_tool(source, "auto", path), path.parent)


def of(tool: str, command: str | None = None, **given: Any) -> Translation:
    return translate(Source({**LEAST[tool], **given}, command=command), TOOLS[tool], CONFIGS)


def effects(found: Translation) -> dict[str, str]:
    return {each.key: each.effect for each in found.left}


def test_a_script_of_ms_swift_is_translated_with_its_variables() -> None:
    found = of_file("ms_swift.sh")
    expected = {
        "model": "models/qwen", "nproc_per_node": 2, "output_dir": "output/wards", "tuner": "lora",
        "lora_rank": 16, "lora_alpha": 32.0, "lora_dropout": 0.05, "num_train_epochs": 1.0,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_length": 1024,
        "train_on": "last", "val_size": 0.02, "learning_rate": 2e-4, "warmup_ratio": 0.05,
        "weight_decay": 0.1, "adam_beta2": 0.95, "dtype": "bfloat16", "deepspeed": "zero3",
        "attn_implementation": "flash_attention_2", "save_steps": 50,
    }  # fmt: skip

    assert found.tool == "ms-swift"
    assert {**found.options, **expected} == found.options
    assert {each.name for each in found.defaults} >= {"lora_alpha", "weight_decay", "adam_beta2"}
    assert effects(found)["system"] == "changes"
    assert found.unknown == ()


def test_a_dump_of_all_arguments_reports_only_what_is_on() -> None:
    found = of_file("ms_swift_args.json")

    assert effects(found) == {
        "report_to": "none", "model_type": "none", "swift_version": "none", "eval_strategy": "none",
    }  # fmt: skip
    assert [each for each in found.left if each.effect == "changes"] == []
    assert found.unknown == ()


def test_llama_factory_names_become_the_files_of_its_registry() -> None:
    found = of_file("llama_factory/sft.yaml")
    expected = {
        "model": "models/llama", "tuner": "qlora", "quant_bits": 4, "lora_rank": 8,
        "lora_alpha": 16.0, "target_modules": ["q_proj", "v_proj"], "max_length": 1024,
        "truncation_strategy": "right", "train_on": "last", "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8, "lr_scheduler_type": "cosine", "dtype": "bfloat16",
        "attn_implementation": "flash_attention_2", "deepspeed": "zero2_offload", "val_size": 0.0,
    }  # fmt: skip

    assert {**found.options, **expected} == found.options
    if "dataset_info" in fields():
        assert found.options["dataset"] == ["wards", "identity"]
        assert found.options["dataset_info"] == "data"
    else:
        assert found.options["dataset"] == ["data/wards.jsonl", "identity"]
    assert effects(found)["dataset"] == "check"
    assert effects(found)["template"] == "check"
    assert effects(found)["warmup_steps"] == "changes"
    assert "warmup_ratio" not in found.options
    assert found.unknown == ()


def test_axolotl_counts_rows_a_step_otherwise() -> None:
    found = of_file("axolotl.yml")
    expected = {
        "tuner": "qlora", "quant_bits": 4, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4, "num_train_epochs": 4.0, "max_steps": 200,
        "warmup_ratio": 0.05, "optim": "adamw_8bit", "lora_alpha": 16.0, "dtype": "auto",
        "gradient_checkpointing": "on", "target_modules": ["all-linear"], "val_size": 0.05,
        "dataset": ["data/wards.jsonl", "data/rounds.jsonl"],
    }  # fmt: skip

    assert {**found.options, **expected} == found.options
    assert effects(found)["neftune_noise_alpha"] == "changes"
    assert effects(found)["wandb_project"] == "none"
    assert "datasets: field_messages" not in effects(found)
    assert found.unknown == ()


def test_a_command_of_trl_goes_over_its_file() -> None:
    found = of_file("trl.sh")
    expected = {
        "model": "models/qwen", "nproc_per_node": 4, "deepspeed": "zero2", "tuner": "qlora",
        "quant_bits": 4, "lora_rank": 32, "lora_alpha": 32.0, "lora_dropout": 0.05,
        "learning_rate": 1e-4, "lr_scheduler_type": "linear", "warmup_ratio": 0.0,
        "max_length": 512, "train_on": "assistant", "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1, "target_modules": ["q_proj", "v_proj"],
        "dtype": "bfloat16",
    }  # fmt: skip

    assert {**found.options, **expected} == found.options
    assert found.unknown == ()


@pytest.mark.parametrize(
    ("tool", "given", "expected"),
    [
        ("ms-swift", {"tuner_type": "full"}, {"tuner": "full", "learning_rate": 1e-5}),
        ("ms-swift", {"sft_type": "lora"}, {"tuner": "lora", "learning_rate": 1e-4}),
        ("ms-swift", {"per_device_train_batch_size": "4"}, {"gradient_accumulation_steps": 4}),
        ("ms-swift", {"quant_bits": 8}, {"tuner": "qlora", "quant_bits": 8}),
        ("ms-swift", {"loss_scale": "all"}, {"train_on": "all"}),
        ("llama-factory", {"lora_rank": 64}, {"lora_rank": 64, "lora_alpha": 128.0}),
        ("llama-factory", {"lora_target": "all"}, {"target_modules": ["all-linear"]}),
        ("llama-factory", {"train_on_prompt": "true"}, {"train_on": "all"}),
        ("llama-factory", {"flash_attn": "disabled"}, {"attn_implementation": "eager"}),
        ("llama-factory", {"pure_bf16": True}, {"dtype": "bfloat16"}),
        ("llama-factory", {"disable_gradient_checkpointing": True},
         {"gradient_checkpointing": "off"}),
        ("llama-factory", {"optim": "paged_adamw_8bit"}, {"optim": "paged_adamw_8bit"}),
        ("llama-factory", {"warmup_steps": 0.1}, {"warmup_ratio": 0.1}),
        ("llama-factory", {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
         {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}),
        ("llama-factory", {"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1},
         {"lr_scheduler_type": "constant", "warmup_ratio": 0.1}),
        ("axolotl", {"load_in_8bit": True}, {"tuner": "qlora", "quant_bits": 8}),
        ("axolotl", {"train_on_inputs": True}, {"train_on": "all"}),
        ("axolotl", {"excess_length_strategy": "truncate"}, {"truncation_strategy": "right"}),
        ("axolotl", {}, {"max_length": 512, "num_train_epochs": 1.0, "warmup_ratio": 0.03}),
        ("axolotl", {"fp16": True, "bf16": False}, {"dtype": "float16"}),
        ("axolotl", {"deepspeed": "deepspeed_configs/zero3_bf16.json"}, {"deepspeed": "zero3"}),
        ("trl", {"lora_target_modules": "all-linear"}, {"target_modules": ["all-linear"]}),
        ("trl", {}, {"train_on": "all", "learning_rate": 2e-5, "lora_alpha": 32.0}),
        ("trl", {"bf16": "false"}, {"dtype": "float32"}),
        ("trl", {"bf16": False, "fp16": True}, {"dtype": "float16"}),
    ],
)  # fmt: skip
def test_a_setting_means_what_it_meant(
    tool: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = of(tool, **given)

    assert {**found.options, **expected} == found.options


@pytest.mark.parametrize(
    ("tool", "given", "key"),
    [
        ("ms-swift", {"tuner_type": "adalora"}, "tuner_type"),
        ("ms-swift", {"quant_bits": 4, "quant_method": "hqq"}, "quant_method"),
        ("ms-swift", {"loss_scale": "react"}, "loss_scale"),
        ("ms-swift", {"freeze_vit": "false"}, "freeze_vit"),
        ("ms-swift", {"lora_bias": "all"}, "lora_bias"),
        ("llama-factory", {"pissa_init": True}, "pissa_init"),
        ("llama-factory", {"optim": "adafactor"}, "optim"),
        ("llama-factory", {"lr_scheduler_type": "polynomial"}, "lr_scheduler_type"),
        ("llama-factory", {"packing": True}, "packing"),
        ("llama-factory", {"stage": "ppo"}, "stage"),
        ("llama-factory", {"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
        ("axolotl", {"lora_model_dir": "out/first"}, "lora_model_dir"),
        ("axolotl", {"lora_target_linear": None}, "lora_target_modules"),
        ("axolotl", {"rl": "grpo"}, "rl"),
        ("axolotl", {"datasets": [{"path": "a.jsonl", "roles_to_train": ["user"]}]},
         "datasets: roles_to_train"),
        ("trl", {"lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save"),
        ("trl", {}, "lora_target_modules"),
        ("trl", {"learning_rate": "fast"}, "learning_rate"),
        ("trl", {"warmup_ratio": float("inf")}, "warmup_ratio"),
    ],
)  # fmt: skip
def test_what_changes_the_result_is_reported_as_such(
    tool: str, given: dict[str, Any], key: str
) -> None:
    assert effects(of(tool, **given))[key] == "changes"


@pytest.mark.parametrize(
    ("tool", "given", "pair"),
    [
        ("ms-swift", {"columns": '{"complaint": "query"}'}, "complaint=query"),
        ("axolotl", {"datasets": [{"path": "a.jsonl", "field_messages": "talk"}]}, "talk=messages"),
        ("trl", {"dataset_text_field": "body"}, "body=text"),
    ],
)
def test_what_columns_are_is_carried_over_or_reported(
    tool: str, given: dict[str, Any], pair: str
) -> None:
    found = of(tool, **given)

    if "columns" in fields():
        assert found.options["columns"] == [pair]
    else:
        assert "rename those of the file" in " ".join(each.reason for each in found.left)


def test_an_optimizer_that_mst_has_not_is_not_replaced_by_the_tools_default() -> None:
    assert "optim" not in of("llama-factory", optim="adafactor").options


@pytest.mark.parametrize(
    ("tool", "given", "missing"),
    [
        ("ms-swift", {"per_device_train_batch_size": "many"}, "gradient_accumulation_steps"),
        ("llama-factory", {"lora_rank": "high"}, "lora_alpha"),
    ],
)
def test_a_default_that_follows_from_a_senseless_value_is_not_written(
    tool: str, given: dict[str, Any], missing: str
) -> None:
    found = of(tool, **given)

    assert missing not in found.options
    assert effects(found)[next(iter(given))] == "changes"


def test_devices_that_were_shown_are_trained_on_but_not_by_ms_swift() -> None:
    shown = {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    found = {
        tool: translate(Source(LEAST[tool], environment=shown), TOOLS[tool], CONFIGS).options
        for tool in TOOLS
    }

    assert {tool: each.get("nproc_per_node") for tool, each in found.items()} == {
        "ms-swift": None,
        "llama-factory": 3,
        "axolotl": 3,
        "trl": 3,
    }


def test_processes_of_accelerate_are_those_of_all_machines() -> None:
    launcher = {"num_processes": "8", "num_machines": "2", "machine_rank": "1"}
    source = Source(LEAST["trl"], "trl", "sft", {}, launcher)
    found = translate(source, TOOLS["trl"], CONFIGS).options

    assert (found["nproc_per_node"], found["nnodes"], found["node_rank"]) == (4, 2, 1)


def test_a_deepspeed_file_is_read_for_its_stage(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}')

    assert of("llama-factory", deepspeed=str(file)).options["deepspeed"] == "zero3_offload"


@pytest.mark.parametrize("tool", TOOLS)
def test_each_key_of_a_tables_rename_is_an_option(tool: str) -> None:
    assert set(TOOLS[tool].renamed.values()) <= set(fields())


@pytest.mark.parametrize("tool", TOOLS)
def test_a_default_that_differs_from_ours_is_written_out(tool: str) -> None:
    found = of(tool).options
    ours = TrainRequest()
    written = {
        name for name, value in found.items()
        if (list(v) if isinstance(v := getattr(ours, name), tuple) else v) != value
    }  # fmt: skip

    assert written >= {
        "learning_rate",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    } - ({"learning_rate"} if tool == "axolotl" else set())
    assert found["val_size"] == 0.0


@pytest.mark.parametrize(
    ("tool", "command", "given", "task"),
    [
        ("ms-swift", "pt", {}, "pt"),
        ("ms-swift", "rlhf", {}, "dpo"),
        ("ms-swift", None, {"rlhf_type": "kto"}, "kto"),
        ("llama-factory", None, {"stage": "dpo", "pref_loss": "orpo"}, "orpo"),
        ("llama-factory", None, {"stage": "rm"}, "rm"),
        ("axolotl", None, {"rl": "ipo"}, "dpo"),
        ("axolotl", None, {"datasets": [{"path": "a.txt", "type": "completion"}]}, "pt"),
        ("trl", "dpo", {}, "dpo"),
        ("trl", "reward", {}, "rm"),
    ],
)
def test_the_task_is_written_or_reported(
    tool: str, command: str | None, given: dict[str, Any], task: str
) -> None:
    found = of(tool, command, **given)

    if "task" in fields():
        assert found.options["task"] == task
    else:
        assert any(
            each.effect == "changes" and "answers only" in each.reason for each in found.left
        )


def test_reasons_hold_no_value() -> None:
    found = of("trl", hub_token="planted", wandb_token="planted", lora_r="planted", zzz="planted")

    assert not any("planted" in str(each) for each in [*found.left, *found.unknown])
    assert Left("lora_r", "mst's lora_rank takes no such value", "changes") in found.left
