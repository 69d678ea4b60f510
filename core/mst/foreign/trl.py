"""TRL's commands and scripts, and the arguments of transformers' Trainer.

Keys, defaults and meanings: huggingface/trl at f2cd57710, trl/trainer/*_config.py, model_config.py
and trl/scripts; transformers 5.23, TrainingArguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mst.foreign import datasets, method, objectives, trainer
from mst.foreign.draft import Draft, truth
from mst.foreign.rules import COMMON, Dropped
from mst.foreign.tool import Tool

RENAMED = {
    "model_name_or_path": "model",
    "output_dir": "output_dir",
    "max_length": "max_length",
    "max_seq_length": "max_length",
    "lora_r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "seed": "seed",
}
DROPPED = (
    Dropped(
        "mst prepares rows in memory",
        "dataset_streaming dataset_kwargs dataset_batch_size streaming",
    ),
    Dropped(
        "mst needs no such word",
        "lora_task_type use_bnb_nested_quant bnb_4bit_quant_storage ignore_bias_buffers"
        " dataset_test_split precompute_ref_batch_size padding_free pad_to_multiple_of eval_packing"
        " packing_strategy max_prompt_length max_completion_length pad_token padding_value"
        " generate_during_eval is_encoder_decoder disable_dropout dtype torch_dtype"
        " model_adapter_name"
        " ref_adapter_name reference_free force_use_ref_model truncation_side gradient_checkpoint"
        " use_logits_to_keep discopop_tau f_alpha_divergence_coef",
    ),
    Dropped("tokens are the tokenizer's own", "eos_token", "changes"),
    Dropped("code of theirs isn't run", "model_init_kwargs", "check"),
    Dropped(
        "mst's loss has no such term",
        "ld_alpha loss_weights use_weighting alpha"
        " center_rewards_coefficient f_divergence_type=reverse_kl sync_ref_model",
        "changes",
    ),
    Dropped("of another way of training, which is not asked for here", "ref_model_*"),
    Dropped("rows come in an order drawn from `seed`", "shuffle_dataset"),
)
_TASKS = {"reward": "rm", "cpo": "cpo"}


def translate(draft: Draft) -> None:
    """Take what a rename doesn't tell."""
    task = _TASKS.get(draft.command or "sft", draft.command or "sft")
    if task == "cpo" and draft.given.get("loss_type") == "simpo":
        task = "simpo"
    objectives.task(draft, task, draft.command or "sft")
    objectives.preference(draft, task)
    objectives.simpo_with_likelihood(draft, task)
    adapters = truth(draft.take("use_peft"))
    method.tuner(draft, "lora" if adapters else "full", "use_peft")
    _adapters(draft, adapters)
    _datasets(draft)
    _masks(draft, task)
    template = draft.take("chat_template_path")
    if template is not None and str(template).endswith((".jinja", ".jinja2", ".j2")):
        draft.keep("template", template, "chat_template_path")
    elif template is not None:
        draft.drop("chat_template_path", "template takes a file with a Jinja template", "changes")
    method.attention(draft, draft.take("attn_implementation"), "attn_implementation")
    method.zero(draft, draft.take("deepspeed"), "deepspeed")
    _precision(draft)
    trainer.optimizer(draft, "optim")
    trainer.schedule(draft)
    trainer.lengths(draft)
    trainer.cadence(draft)
    if truth(draft.take("no_gradient_checkpointing")):
        draft.keep("gradient_checkpointing", "off", "no_gradient_checkpointing")
    trainer.checkpointing(draft)
    cut = draft.take("truncation_mode")
    if cut is not None and str(cut) != "keep_start":
        draft.drop("truncation_mode", "mst cuts at the end of a row", "changes")
    objectives.packing(draft, truth(draft.take("packing")), "packing")


def _adapters(draft: Draft, adapters: bool) -> None:
    modules = draft.take("lora_target_modules")
    if not adapters:
        draft.take(*(key for key in RENAMED if key.startswith(("lora_", "use_"))))
    elif modules is None:
        method.targets_of_peft(draft, "lora_target_modules")
    else:
        method.targets(draft, modules, "lora_target_modules")
    bits = method.loaded_in(draft)
    if str(draft.take("bnb_4bit_quant_type")) == "fp4" and bits == 4:
        draft.drop("bnb_4bit_quant_type", "mst's 4 bits are NF4", "changes")


def _datasets(draft: Draft) -> None:
    name, mixture = draft.take("dataset_name"), draft.take("datasets")
    if name is not None:
        datasets.write(draft, "dataset", [str(name)], "dataset_name")
    for key in ("dataset_config", "dataset_train_split"):
        if draft.take(key) not in (None, "train"):
            draft.drop(key, "name the file of that part", "check")
    paths: list[str] = []
    for each in mixture if isinstance(mixture, list) else []:
        entry = each if isinstance(each, dict) else {"path": each}
        files = entry.get("data_files") or entry.get("path")
        paths += files if isinstance(files, list) else [str(files)]
        if set(entry) - {"path", "data_files"}:
            draft.drop("datasets", "name the file of each part; columns are known by name", "check")
    datasets.write(draft, "dataset", paths, "datasets")
    size = draft.take("test_split_size")
    if size is not None:
        draft.keep("val_size", size, "test_split_size")
    column = draft.take("dataset_text_field")
    if column is not None:
        datasets.columns(draft, {str(column): "text"}, "dataset_text_field")


def _masks(draft: Draft, task: str) -> None:
    """Translate which tokens carry loss: TRL's default trains on whole conversations."""
    assistant = draft.take("assistant_only_loss")
    completion = draft.take("completion_only_loss")
    if task != "sft":
        return
    if truth(assistant) or truth(completion):
        key = "assistant_only_loss" if truth(assistant) else "completion_only_loss"
        draft.keep("train_on", "assistant", key)
    elif completion is not None:
        draft.keep("train_on", "all", "completion_only_loss")
    else:
        draft.drop(
            "completion_only_loss",
            "not given: theirs is loss on all text, but on the completion alone where rows have"
            " prompt and completion; set train_on to assistant for those",
            "check",
        )


def _precision(draft: Draft) -> None:
    dtype = draft.given.get("dtype") or draft.given.get("torch_dtype")
    if str(draft.given.get("bf16")).lower() == "false" and not truth(draft.given.get("fp16")):
        draft.take("bf16", "fp16")
        draft.keep("dtype", str(dtype or "float32").removeprefix("torch."), "bf16")
    else:
        trainer.precision(draft)


def _learning_rate(options: Mapping[str, Any]) -> float:
    return {"sft": 2e-5, "rm": 1e-4}.get(options.get("task", "sft"), 1e-6)


def _train_on(options: Mapping[str, Any]) -> str | None:
    if options.get("task", "sft") == "sft":
        return "all"
    return objectives.default_train_on(options)


TRL = Tool(
    name="trl",
    title="TRL",
    marks=(
        "dataset_name dataset_config dataset_train_split dataset_test_split use_peft"
        " dataset_text_field"
        " lora_target_modules assistant_only_loss completion_only_loss chat_template_path"
        " dataset_streaming load_in_4bit lora_task_type use_bnb_nested_quant truncation_mode"
    ),
    renamed=RENAMED,
    dropped=(*DROPPED, *COMMON),
    translate=translate,
    defaults={
        "beta": objectives.default_beta,
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "learning_rate": _learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_length": 1024,
        "truncation_strategy": "right",
        "train_on": _train_on,
        "dtype": "bfloat16",
        "val_size": 0.0,
        "optim": "adamw_torch",
    },
)
