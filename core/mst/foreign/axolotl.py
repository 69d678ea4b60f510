"""axolotl: its YAML.

Keys, defaults and meanings: axolotl-ai-cloud/axolotl at 067b021c8, src/axolotl/utils/schemas and
src/axolotl/core/builders/base.py.
"""

from __future__ import annotations

import re
from typing import Any

from mst.foreign import datasets, method, objectives, trainer
from mst.foreign.draft import Draft, number, truth
from mst.foreign.rules import COMMON, OWN_KERNELS, Dropped
from mst.foreign.tool import Tool

RENAMED = {
    "base_model": "model",
    "output_dir": "output_dir",
    "sequence_len": "max_length",
    "num_epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size",
    "lora_r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "seed": "seed",
}
DROPPED = (
    Dropped(
        "of another way of training, which is not asked for here",
        "relora_* qgalore_* dion_* ebft vllm trl jagged_* lisa_* gptq_* bnb_config_kwargs"
        " max_prompt_len generate_samples generation_* num_generation_samples torchdistx_path"
        " adam_beta3 adam_epsilon2 loraplus_lr_embedding gradio_* bench_* do_bench_eval"
        " eval_causal_lm_metrics do_causal_lm_eval",
    ),
    Dropped(
        "mst prepares rows in memory",
        "dataset_* shuffle_* skip_prepare_dataset num_dataset_shards_to_save streaming"
        " streaming_multipack_buffer_size pretrain_multipack_* sample_packing_* eval_sample_packing"
        " pad_to_sequence_len pad_to_multiple_of multipack_real_batches batch_flattening"
        " is_preprocess preprocess_iterable total_num_tokens total_supervised_tokens",
    ),
    Dropped(
        "mst reads the model's own configuration",
        "model_type tokenizer_type tokenizer_config tokenizer_use_fast tokenizer_legacy"
        " tokenizer_use_mistral_common tokenizer_save_jinja_files processor_type processor_kwargs"
        " base_model_config cls_model_config base_model_ignore_patterns is_*_derived_model"
        " type_of_model experts_implementation strict experimental_skip_move_to_device"
        " revision_of_model axolotl_config_path lora_on_cpu qlora_sharded_model_loading"
        " lora_fan_in_fan_out gc_steps gc_collect_steps loss_watchdog_* eval_table_size"
        " eval_max_new_tokens dynamic_checkpoint merge_lora merge_method eval_sequence_len"
        " resources_per_worker device ddp local_world_size use_wandb llama4_linearized_experts"
        " peft_autocast_adapter_dtype quantize_moe_experts layer_offloading selective_checkpointing"
        " embeddings_skip_upcast mean_resizing_embeddings min_sample_len",
    ),
    Dropped(
        OWN_KERNELS,
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel flash_attn_*"
        " tiled_mlp*"
        " chunked_cross_entropy* cut_cross_entropy* scaling_softmax flash_optimum sdpa_varlen"
        " fused_attn_kernel large_head_attention gemma4_hybrid_attn_impl use_scattermoe"
        " use_sonicmoe"
        " flex_attn_compile_kwargs deepcompile unsloth_*",
    ),
    Dropped("plugins of theirs aren't loaded; those of kernels change nothing", "plugins", "check"),
    Dropped("tokens are the tokenizer's own", "special_tokens eot_tokens", "check"),
    Dropped(
        "mst adds no words to a model",
        "tokens added_tokens_overrides resize_token_embeddings_to_32x shrink_embeddings"
        " fix_untrained_tokens",
        "changes",
    ),
    Dropped("mst freezes nothing by name", "unfrozen_parameters", "changes"),
    Dropped("mst freezes no part of a model", "freeze_mm_modules", "check"),
    Dropped("adapters of other tools aren't trained on", "lora_model_dir", "changes"),
    Dropped(
        "mst's adapters are those of LoRA's paper, all of one rank",
        "lora_rank_pattern lora_alpha_pattern peft peft_* ",
        "changes",
    ),
    Dropped("mst begins with the model's weights", "reinit_weights", "changes"),
    Dropped("mst quantizes with bitsandbytes (NF4, int8)", "gptq model_quantization_*", "changes"),
    Dropped(
        "mst computes in bfloat16, float16 or float32", "fp8 fp8_* qat quantization", "changes"
    ),
    Dropped(
        "mst leaves the positions as the model has them", "rope_scaling use_pose pose_*", "changes"
    ),
    Dropped(
        "no option for it",
        "relora use_eaft eaft_* orpo_alpha trainer_cls reward_model"
        " process_reward_model num_labels dpo_use_weighting curriculum_sampling"
        " center_rewards_coefficient noisy_embedding_alpha"
        " s2_attention dpo_norm_loss",
        "changes",
    ),
    Dropped(
        "mst adds no system message: put it into the rows", "default_system_message", "changes"
    ),
    Dropped("the template decides", "chat_template_kwargs", "check"),
)
# Keys of a data set that say where and what it is, and not what is learnt.
_PLACE = {
    "path", "data_files", "ds_type", "split", "name", "type", "revision", "trust_remote_code",
    "shards", "shards_idx", "preprocess_shards", "chat_template",
}  # fmt: skip


def translate(draft: Draft) -> None:
    """Take what a rename doesn't tell."""
    _task(draft)
    adapter = draft.take("adapter")
    method.tuner(draft, str(adapter) if adapter is not None else "full", "adapter")
    _quantization(draft, adapter)
    linear = truth(draft.take("lora_target_linear"))
    modules = draft.take("lora_target_modules")
    if linear or modules is not None:
        key = "lora_target_linear" if linear else "lora_target_modules"
        method.targets(draft, "all-linear" if linear else modules, key)
    elif adapter is not None:
        method.targets_of_peft(draft, "lora_target_modules")
    _datasets(draft)
    _template(draft)
    _attention(draft)
    method.zero(draft, draft.take("deepspeed"), "deepspeed")
    trainer.precision(draft)
    if truth(draft.take("float32")):
        draft.keep("dtype", "float32", "float32")
    trainer.optimizer(draft, "optimizer")
    trainer.schedule(draft, "lr_scheduler")
    _batch(draft)
    trainer.lengths(draft)
    _cadence(draft)
    trainer.checkpointing(draft)
    long = draft.take("excess_length_strategy")
    if long is not None:
        strategy = {"drop": "delete", "truncate": "right"}.get(str(long), str(long))
        draft.keep("truncation_strategy", strategy, "excess_length_strategy")
    objectives.packing(draft, truth(draft.take("sample_packing")), "sample_packing")


def _task(draft: Draft) -> None:
    kind = draft.take("rl")
    name = str(kind).lower() if kind is not None else "sft"
    name = "rm" if truth(draft.given.get("reward_model")) else name
    pretraining = draft.given.get("pretraining_dataset")
    entries = draft.given.get("datasets")
    plain = bool(entries) and _kinds(entries) <= {"completion"}
    name = "pt" if (pretraining or plain) and name == "sft" else name
    if name == "ipo":
        objectives.task(draft, "dpo", "rl")
        draft.keep("loss_type", "ipo", "rl")
    else:
        objectives.task(draft, name, draft.spelt("rl", "pretraining_dataset", "datasets"))
    objectives.preference(draft, "dpo" if name == "ipo" else name)
    objectives.simpo_with_likelihood(draft, name)


def _quantization(draft: Draft, adapter: Any) -> None:
    if method.loaded_in(draft) is None and adapter == "qlora":
        method.quantized(draft, 4, "adapter")


def _datasets(draft: Draft) -> None:
    pretraining = draft.take("pretraining_dataset")
    given = draft.take("datasets") or pretraining
    key = draft.spelt("datasets", "pretraining_dataset")
    datasets.write(draft, "dataset", _paths(draft, given, key), key)
    datasets.write(
        draft, "val_dataset", _paths(draft, draft.take("test_datasets"), "test_datasets"),
        "test_datasets",
    )  # fmt: skip
    size = draft.take("val_set_size")
    if size is not None and "val_dataset" not in draft.options:
        draft.keep("val_size", size, "val_set_size")
    _masks(draft, given)


def _paths(draft: Draft, given: Any, key: str) -> list[str]:
    """Return the files of a list of data sets, and report what else is said about them."""
    found: list[str] = []
    for each in given if isinstance(given, list) else [given] if given else []:
        entry = each if isinstance(each, dict) else {"path": each}
        files = entry.get("data_files")
        named = files if isinstance(files, list) else [files] if files else [entry.get("path")]
        path = entry.get("path")
        if isinstance(path, str) and isinstance(files, (str, list)) and path not in _READERS:
            named = [file if "/" in str(file) else f"{path}/{file}" for file in named]
        found += [str(file) for file in named if file]
        for name in ("split", "name"):
            if entry.get(name) not in (None, "train"):
                draft.drop(f"{key}: {name}", "name the file of that part", "check")
        _columns(draft, entry, key)
    return list(dict.fromkeys(found))


def _columns(draft: Draft, entry: dict[str, Any], key: str) -> None:
    """Translate which column of a data set holds what."""
    kind = entry.get("type")
    said = {**entry, **kind} if isinstance(kind, dict) else entry
    mapping = {name: column for name, column in said.items() if name in _ROLES}
    usual = {"messages", "conversations"}
    roles = {
        str(column): _ROLES[name]
        for name, column in mapping.items()
        if isinstance(column, str) and not (name == "field_messages" and column in usual)
    }
    datasets.columns(draft, roles, f"{key}: {', '.join(sorted(mapping))}")
    if {"message_field_role", "message_field_content"} & set(entry):
        draft.drop(f"{key}: message_field_*", "mst knows role and content, from and value", "check")


# What a data set's fields hold, as roles of mst's columns.
_ROLES = {
    "field_messages": "messages",
    "field_system": "system",
    "field_instruction": "prompt",
    "field_prompt": "prompt",
    "field_input": "input",
    "field_output": "response",
    "field_completion": "response",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_label": "label",
    "field_tools": "tools",
    "field_thinking": "reasoning",
    "field": "text",
    "text_column": "text",
}
# Values of `path` that name a reader of the `datasets` library, not a place.
_READERS = ("json", "csv", "parquet", "arrow", "text")


def _kinds(given: Any) -> set[str]:
    """Return the kinds of data sets: `alpaca` of `alpaca:chat`, `chat_template` of its variants."""
    entries = [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []
    return {str(each.get("type")).split(".")[0].split(":")[0] for each in entries}


def _masks(draft: Draft, given: Any) -> None:
    """Translate which tokens carry loss, said for the whole and for each data set."""
    entries = [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []
    kinds = _kinds(given)
    if truth(draft.take("train_on_inputs")):
        draft.keep("train_on", "all", "train_on_inputs")
    elif kinds and kinds <= {"completion", "pretrain"} and "task" not in draft.options:
        draft.keep("train_on", "all", "datasets: type", "plain text has loss on all of it")
    for each in entries:
        roles = each.get("roles_to_train")
        if roles not in (None, ["assistant"], ["gpt"], ["gpt", "assistant"], ["assistant", "gpt"]):
            draft.drop(
                "datasets: roles_to_train", "mst trains on the assistant or on all", "changes"
            )
        if each.get("train_on_eos") in ("all", "last", "none") or each.get("train_on_eot") in (
            "all", "last", "none"
        ):  # fmt: skip
            draft.drop("datasets: train_on_eos", "an answer's end always carries loss", "changes")
        if isinstance(each.get("type"), dict) or re.match(
            r"\w+\.\w+_transform", str(each.get("type"))
        ):
            draft.drop(
                "datasets: type", "a format of their own: rewrite the rows as messages", "check"
            )
        plain = {
            *_ROLES,
            "roles_to_train",
            "train_on_eos",
            "train_on_eot",
            "message_property_mappings",
        }
        rest = set(each) - _PLACE - plain
        rest -= {key for key in rest if key.startswith("message_field")}
        for key in sorted(rest):
            draft.drop(f"datasets: {key}", "mst reads rows as docs/data.md says", "check")


def _template(draft: Draft) -> None:
    jinja, name = draft.take("chat_template_jinja"), draft.take("chat_template")
    if jinja is not None and str(jinja).endswith((".jinja", ".jinja2", ".j2")):
        draft.keep("template", jinja, "chat_template_jinja")
    elif jinja is not None:
        draft.drop(
            "chat_template_jinja", "write it into a file, and set template to that", "changes"
        )
    elif name is not None and not str(name).startswith("tokenizer_default"):
        draft.drop("chat_template", "mst renders with the model's own chat template", "check")


def _attention(draft: Draft) -> None:
    named = {
        "flash_attention": "flash_attention_2",
        "sdp_attention": "sdpa",
        "flex_attention": "flex_attention",
        "eager_attention": "eager",
        "xformers_attention": "xformers",
        "sage_attention": "sage",
    }
    method.attention(draft, draft.take("attn_implementation"), "attn_implementation")
    for key, value in named.items():
        if truth(draft.take(key)) and "attn_implementation" not in draft.options:
            method.attention(draft, value, key)


def _batch(draft: Draft) -> None:
    """Translate `batch_size`, which is micro-batch × accumulation there."""
    whole = number(draft.take("batch_size"))
    micro = number(draft.given.get("micro_batch_size")) or 1
    if whole is not None and draft.given.get("gradient_accumulation_steps") is None:
        draft.keep("gradient_accumulation_steps", max(1, int(whole // micro)), "batch_size")


def _cadence(draft: Draft) -> None:
    for what in ("save", "eval"):
        times = draft.take(f"{what}s_per_epoch")
        if times is not None and number(times) != 1:
            draft.drop(f"{what}s_per_epoch", f"mst does it each epoch; or set {what}_steps")
    draft.take("auto_resume_from_checkpoints")
    trainer.cadence(draft)


AXOLOTL = Tool(
    name="axolotl",
    title="axolotl",
    marks=(
        "base_model sequence_len micro_batch_size num_epochs val_set_size sample_packing adapter"
        " dataset_prepared_path lora_target_linear datasets evals_per_epoch saves_per_epoch"
        " pad_to_sequence_len special_tokens flash_attention train_on_inputs lora_model_dir"
        " lr_scheduler optimizer"
    ),
    renamed=RENAMED,
    dropped=(*DROPPED, *COMMON),
    translate=translate,
    defaults={
        "beta": objectives.default_beta,
        "train_on": objectives.default_train_on,
        "lora_dropout": 0.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_length": 512,
        "val_size": 0.0,
        "optim": "adamw_torch",
    },
)
