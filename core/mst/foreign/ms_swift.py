"""ms-swift: `swift sft|pt|rlhf`, its YAML, and the args.json that it leaves.

Keys, defaults and meanings: modelscope/ms-swift at 3602360a5, swift/arguments and
swift/trainers/arguments.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from mst.foreign import datasets, method, objectives, trainer
from mst.foreign.draft import Draft, truth, words
from mst.foreign.rules import COMMON, Dropped
from mst.foreign.tool import Tool

RENAMED = {
    "model": "model",
    "output_dir": "output_dir",
    "max_length": "max_length",
    "lora_rank": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "seed": "seed",
    "early_stop_interval": "early_stopping_patience",
}
DROPPED = (
    Dropped(
        "of another way of training, which is not asked for here",
        "vera_* boft_* fourier_* adalora_* llamapro_* reft_* lora_ga_* adapter_act adapter_length"
        " galore_* lisa_step_interval vllm_* reward_* teacher_* num_generations temperature top_*"
        " repetition_penalty max_new_tokens max_completion_length num_beams stream stop_words"
        " logprobs stopping_strategy shuffle_buffer_size packing_num_proc packing_strategy"
        " packing_length hqq_axis bnb_4bit_compute_dtype bnb_4bit_quant_storage num_labels"
        " problem_type norm_bbox max_pixels kl_coef cliprange* vf_coef gamma lam num_ppo_epochs"
        " num_mini_batches use_vllm sleep_level log_completions offload_* epsilon*"
        " overlong_filter steps_per_generation num_iterations sft_alpha colocate_groups"
        " advantage_estimator importance_sampling_level gkd_* multi_turn_scheduler max_turns"
        " log_rollout_* scale_rewards async_generate dynamic_sample kl_in_reward chord_* fipo_*"
        " local_rollout_* seq_kd response_length missing_eos_penalty num_sample_generations lmbda"
        " discopop_tau",
    ),
    Dropped(
        "mst prepares rows in memory",
        "dataset_shuffle val_dataset_shuffle lazy_tokenize load_from_cache_file streaming"
        " download_mode strict cached_dataset cached_val_dataset train_dataloader_shuffle",
    ),
    Dropped(
        "mst needs no such word",
        "model_type task_type=causal_lm template_backend load_args load_data_args add_version"
        " create_checkpoint_symlink ignore_args_error check_model acc_strategy eval_metric"
        " tuner_backend=peft swift_version enable_npu_model_patch local_repo_path"
        " use_logits_to_keep"
        " ds3_gather_for_generation rank global_world_size local_world_size model_suffix model_info"
        " model_meta model_dir hub evaluation_strategy training_args padding_side padding_free"
        " model_kwargs use_flash_ckpt resume_only_model eval_dataset* eval_limit"
        " eval_generation_config extra_eval_args eval_use_evalscope ckpt_dir lora_dtype"
        " is_binary_loss_scale predict_with_generate sortish_sampler generation_*"
        " disable_auto_column_mapping experts_impl max_model_len",
    ),
    Dropped(
        "mst doesn't fill names into rows",
        "model_name model_author",
        "check",
    ),
    Dropped(
        "mst freezes nothing by name",
        "freeze_vit=true freeze_aligner=true freeze_* trainable_parameters*",
        "changes",
    ),
    Dropped("mst trains no layers beside the adapters", "modules_to_save", "changes"),
    Dropped("mst adapts layers by name only", "target_regex target_parameters", "changes"),
    Dropped("mst's adapters begin as LoRA's paper has them", "init_weights=true", "changes"),
    Dropped("mst trains no biases", "lora_bias", "changes"),
    Dropped("mst adds no words to a model", "new_special_tokens", "changes"),
    Dropped("mst mixes files by their rows", "interleave_prob", "changes"),
    Dropped(
        "no option for it", "enable_dft_loss enable_channel_loss mrl_dims rope_scaling", "changes"
    ),
    Dropped("mst has one learning rate", "vit_lr aligner_lr", "changes"),
    Dropped("mst trains with AdamW only", "optimizer use_galore lisa_activated_layers", "changes"),
    Dropped(
        "code of others isn't loaded", "external_plugins custom_register_path callbacks", "changes"
    ),
    Dropped("adapters of other tools aren't trained on", "adapters resume_only_model", "changes"),
    Dropped("only the model's own template is used", "agent_template response_prefix", "check"),
    Dropped(
        "the template decides about thinking",
        "enable_thinking preserve_thinking add_non_thinking_prefix=true disable_ignore_empty_think",
        "check",
    ),
    Dropped("for vision models", "vit_gradient_checkpointing"),
)


def _datasets(draft: Draft) -> None:
    count = None
    for key, name in (("dataset", "dataset"), ("val_dataset", "val_dataset")):
        given = draft.take(key)
        paths = []
        for each in words(given) if given is not None else []:
            # [HF::|MS::]path[:subset][#rows]
            parts = re.fullmatch(r"(?:(?:HF|MS)::)?(.+?)(?::[\w/,-]+)?(?:#(\d+))?", each)
            path, count = (parts[1], parts[2]) if parts else (each, None)
            paths += datasets.limited(draft, [path], count, f"{key} (#rows)", drawn=True)
        datasets.write(draft, name, paths, key)
    ratio = draft.take("split_dataset_ratio")
    if ratio is not None and "val_dataset" not in draft.options:
        draft.keep("val_size", ratio, "split_dataset_ratio")
    mapping = _mapping(draft.take("columns"))
    if mapping:
        datasets.columns(draft, mapping, "columns")
    if draft.take("custom_dataset_info") is not None:
        draft.drop("custom_dataset_info", "registers names of data sets; mst takes files", "check")


def _mapping(value: Any) -> dict[str, str]:
    """Return `columns`, a mapping or its JSON, as column to role."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _masks(draft: Draft, task: str) -> None:
    """Translate loss_scale, whose default depends on the command."""
    scale = draft.take("loss_scale")
    use = {"default": "assistant", "last_round": "last", "all": "all"}
    # `last_round+ignore_empty_think`: a strategy, then refinements of it.
    first, *more = str(scale).split("+") if scale is not None else (None,)
    if first in use:
        draft.keep("train_on", use[first], "loss_scale")
    if scale is not None and (first not in use or more):
        draft.drop("loss_scale", "mst weighs tokens 0 or 1 by turns", "changes")
    rendered = draft.take("use_chat_template")
    if rendered is not None and not truth(rendered) and task != "pt":
        draft.drop("use_chat_template", "mst always renders conversations", "changes")


def translate(draft: Draft) -> None:
    """Take what a rename doesn't tell."""
    draft.take("evaluation_strategy")
    command = draft.command or ("rlhf" if draft.given.get("rlhf_type") else "sft")
    task = str(draft.take("rlhf_type") or "dpo") if command == "rlhf" else command
    objectives.task(draft, task, draft.spelt("rlhf_type") if command == "rlhf" else command)
    objectives.preference(draft, task)
    objectives.simpo_with_likelihood(draft, task)
    key = draft.spelt("tuner_type", "train_type", "sft_type")
    method.tuner(draft, str(draft.take("tuner_type", "train_type", "sft_type") or "lora"), key)
    method.targets(draft, draft.take("target_modules"), "target_modules")
    bits = draft.take("quant_bits")
    quantizer = draft.take("quant_method")
    if bits is not None and quantizer not in (None, "bnb"):
        draft.drop("quant_method", "mst quantizes with bitsandbytes (NF4, int8)", "changes")
    method.quantized(draft, bits, "quant_bits")
    if str(draft.take("bnb_4bit_quant_type")) == "fp4" and bits is not None:
        draft.drop("bnb_4bit_quant_type", "mst's 4 bits are NF4", "changes")
    draft.take("bnb_4bit_use_double_quant")
    _datasets(draft)
    _masks(draft, task)
    _template(draft)
    _precision(draft)
    method.attention(draft, draft.take("attn_impl"), "attn_impl")
    method.zero(draft, draft.take("deepspeed"), "deepspeed")
    draft.take("zero_hpz_partition_size", "deepspeed_autotp_size")
    trainer.optimizer(draft, "optim")
    trainer.schedule(draft)
    trainer.lengths(draft)
    trainer.cadence(draft)
    trainer.checkpointing(draft)
    objectives.packing(draft, truth(draft.take("packing")), "packing")
    if draft.given.get("max_length") is None:
        draft.drop(
            "max_length", "not given: theirs is the model's context, mst's at most 2,048", "check"
        )


def _template(draft: Draft) -> None:
    for key, reason in (
        ("template", "mst renders with the model's own chat template: compare with `mst plan`"),
        ("system", "mst adds no system message: put it into the rows"),
    ):
        if draft.take(key) is not None:
            draft.drop(key, reason, "check" if key == "template" else "changes")
    strategy = draft.take("truncation_strategy")
    if strategy is not None:
        draft.keep("truncation_strategy", strategy, "truncation_strategy")


def _precision(draft: Draft) -> None:
    dtype = draft.take("torch_dtype")
    if dtype is None:
        trainer.precision(draft)
    else:
        draft.take("bf16", "fp16")
        draft.keep("dtype", str(dtype).removeprefix("torch."), "torch_dtype")
    draft.take("bf16_full_eval", "fp16_full_eval")


def _learning_rate(options: Mapping[str, Any]) -> float:
    return 1e-5 if options.get("tuner") == "full" else 1e-4


def _beta(options: Mapping[str, Any]) -> float | None:
    return 2.0 if options.get("task") == "simpo" else objectives.default_beta(options)


def _gamma(options: Mapping[str, Any]) -> float | None:
    return 1.0 if options.get("task") == "simpo" else None


def _train_on(options: Mapping[str, Any]) -> str | None:
    # loss_scale is last_round, but for orpo.
    return None if options.get("task") == "orpo" else objectives.default_train_on(options)


def _accumulation(options: Mapping[str, Any]) -> int | None:
    """Return what makes 16 rows a step on all devices together; None where theirs made no sense."""
    micro: int | None = options.get("per_device_train_batch_size")
    if micro is None:
        return None
    rows: int = micro * options.get("nproc_per_node", 1)
    machines: int = options.get("nnodes", 1)
    return max(1, math.ceil(16 / rows / machines))


MS_SWIFT = Tool(
    name="ms-swift",
    title="ms-swift",
    marks=(
        "tuner_type train_type sft_type split_dataset_ratio rlhf_type attn_impl quant_bits"
        " quant_method"
        " loss_scale swift_version lazy_tokenize model_author model_name agent_template torch_dtype"
        " external_plugins add_version load_data_args padding_free freeze_vit freeze_aligner"
        " use_chat_template dataset_shuffle early_stop_interval quant_method adapters"
    ),
    renamed=RENAMED,
    dropped=(*DROPPED, *COMMON),
    translate=translate,
    defaults={
        "beta": _beta,
        "simpo_gamma": _gamma,
        "train_on": _train_on,
        "lora_rank": 8,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "learning_rate": _learning_rate,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "warmup_ratio": 0.0,
        "max_grad_norm": 1.0,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": _accumulation,
        "val_size": 0.0,
        "optim": "adamw_torch",
    },
)
