"""LLaMA-Factory: `llamafactory-cli train`, its YAML and its JSON.

Keys, defaults and meanings: hiyouga/LLaMA-Factory at ff6d4d12e, src/llamafactory/hparams.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mst.foreign import datasets, method, objectives, trainer
from mst.foreign.draft import Draft, truth, words
from mst.foreign.rules import COMMON, OWN_KERNELS, Dropped
from mst.foreign.tool import Tool

RENAMED = {
    "model_name_or_path": "model",
    "output_dir": "output_dir",
    "cutoff_len": "max_length",
    "lora_rank": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "seed": "seed",
    "early_stopping_steps": "early_stopping_patience",
}
DROPPED = (
    Dropped(
        "of another way of training, which is not asked for here",
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules module_dropout oft_*"
        " galore_* apollo_* badam_* ppo_* reward_model* ref_model_quantization_bit pissa_iter"
        " pissa_convert asft_alpha eaft_alpha loraplus_lr_embedding vllm_* sglang_* infer_* kt_*"
        " offload_folder generation_* max_new_tokens temperature top_p top_k do_sample"
        " num_beams repetition_penalty length_penalty eval_num_beams fp8_backend",
    ),
    Dropped(
        "mst prepares rows in memory",
        "preprocessing_batch_size preprocessing_num_workers overwrite_cache tokenized_path"
        " streaming"
        " buffer_size eval_on_each_dataset media_dir",
    ),
    Dropped(
        "mst needs no such word",
        "use_fast_tokenizer split_special_tokens ignore_pad_token_for_loss compute_accuracy"
        " predict_with_generate print_param_status use_v1_kernels double_quantization"
        " upcast_layernorm upcast_lmhead_output moe_aux_loss_coef model_max_length compute_dtype"
        " create_new_adapter quantization_device_map ray_* adapter_folder init_special_tokens"
        " use_mca use_megatron_bridge train_from_scratch disable_shuffling",
    ),
    Dropped(OWN_KERNELS, "shift_attn block_diag_attn"),
    Dropped(
        "for vision and audio models", "image_* video_* audio_* use_audio_in_video crop_to_patches"
    ),
    Dropped(
        "mst freezes no part of a model",
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model",
        "check",
    ),
    Dropped("mst trains no layers beside the adapters", "additional_target", "changes"),
    Dropped("mst's adapters begin as LoRA's paper has them", "pissa_init", "changes"),
    Dropped(
        "mst adds no words to a model",
        "resize_vocab add_tokens add_special_tokens new_special_tokens_config",
        "changes",
    ),
    Dropped(
        "adapters of other tools aren't trained on",
        "adapter_name_or_path ref_model ref_model_adapters",
        "changes",
    ),
    Dropped(
        "mst trains with AdamW only",
        "use_galore use_apollo use_badam use_adam_mini use_muon",
        "changes",
    ),
    Dropped(
        "mst's loss is the cross-entropy",
        "use_dft_loss use_asft_loss use_eaft_loss pref_bco_weight ld_alpha",
        "changes",
    ),
    Dropped("mst adds no layers to a model", "use_llama_pro mixture_of_depths", "changes"),
    Dropped("mst computes in bfloat16, float16 or float32", "fp8 fp8_*", "changes"),
    Dropped("mst mixes files by their rows", "mix_strategy=concat interleave_probs", "changes"),
    Dropped("mst leaves the positions as the model has them", "rope_scaling", "changes"),
    Dropped("mst adds no system message: put it into the rows", "default_system", "changes"),
    Dropped("the template decides", "tool_format enable_thinking=true preserve_thinking", "check"),
    Dropped("an engine of theirs", "use_kt use_hyper_parallel hyper_parallel_*"),
)


def translate(draft: Draft) -> None:
    """Take what a rename doesn't tell."""
    stage = str(draft.take("stage") or "sft")
    name = str(draft.take("pref_loss") or "sigmoid")
    key = draft.spelt("stage")
    if stage == "dpo" and name in ("orpo", "simpo"):
        stage, key = name, "pref_loss"
    objectives.task(draft, stage, key)
    objectives.preference(draft, stage)
    method.tuner(draft, str(draft.take("finetuning_type") or "lora"), "finetuning_type")
    method.targets(draft, draft.take("lora_target"), "lora_target")
    _quantization(draft)
    _datasets(draft)
    _masks(draft, stage)
    template = draft.take("template")
    if template is not None:
        draft.drop("template", "mst renders with the model's own chat template", "check")
    method.attention(draft, draft.take("flash_attn"), "flash_attn")
    method.zero(draft, draft.take("deepspeed"), "deepspeed")
    _precision(draft)
    trainer.optimizer(draft, "optim")
    trainer.schedule(draft)
    trainer.lengths(draft)
    trainer.cadence(draft)
    if truth(draft.take("disable_gradient_checkpointing")):
        draft.keep("gradient_checkpointing", "off", "disable_gradient_checkpointing")
        draft.take("gradient_checkpointing")
    trainer.checkpointing(draft)
    packed = draft.take("packing", "neat_packing")
    if truth(draft.given.get("neat_packing")) or stage == "pt":
        objectives.packing(
            draft, packed is None or truth(packed), draft.spelt("neat_packing", "packing")
        )
    elif truth(packed):
        # Without neat_packing their rows of one sequence see each other.
        draft.drop("packing", "mst's rows that share a sequence never see each other", "changes")


def _quantization(draft: Draft) -> None:
    bits, how = draft.take("quantization_bit"), draft.take("quantization_method")
    if bits is not None and how is not None and str(how).lower() not in ("bnb", "bitsandbytes"):
        draft.drop("quantization_method", "mst quantizes with bitsandbytes (NF4, int8)", "changes")
    method.quantized(draft, bits, "quantization_bit")
    if str(draft.take("quantization_type")) == "fp4" and bits is not None:
        draft.drop("quantization_type", "mst's 4 bits are NF4", "changes")


def _datasets(draft: Draft) -> None:
    directory = str(draft.take("dataset_dir") or "data")
    most = draft.take("max_samples")
    for key, name in (("dataset", "dataset"), ("eval_dataset", "val_dataset")):
        given = draft.take(key)
        if given is not None:
            paths = datasets.registered(draft, words(given), directory)
            limit = "max_samples" if key == "dataset" else f"max_samples of {key}"
            draft.keep(name, datasets.limited(draft, paths, most, limit), key)
    size = draft.take("val_size")
    if size is not None and "val_dataset" not in draft.options:
        draft.keep("val_size", size, "val_size")


def _masks(draft: Draft, stage: str) -> None:
    prompt, last = truth(draft.take("train_on_prompt")), truth(draft.take("mask_history"))
    if stage == "pt" and "task" not in draft.options:
        draft.keep("train_on", "all", "stage", "pre-training has loss on all text")
    elif stage == "sft" and (prompt or last):
        key = "train_on_prompt" if prompt else "mask_history"
        draft.keep("train_on", "all" if prompt else "last", key)


def _precision(draft: Draft) -> None:
    if truth(draft.take("pure_bf16")):
        draft.take("bf16")
        draft.keep("dtype", "bfloat16", "pure_bf16")
        draft.drop("pure_bf16", "mst keeps the weights that are trained in float32", "changes")
    trainer.precision(draft)


def _twice_the_rank(options: Mapping[str, Any]) -> float | None:
    rank: int | None = options.get("lora_rank")
    return None if rank is None else 2.0 * rank


LLAMA_FACTORY = Tool(
    name="llama-factory",
    title="LLaMA-Factory",
    marks=(
        "stage finetuning_type cutoff_len dataset_dir lora_target quantization_bit pref_beta"
        " pref_loss flash_attn overwrite_cache preprocessing_num_workers plot_loss mask_history"
        " train_on_prompt neat_packing max_samples quantization_method val_size"
        " freeze_trainable_layers additional_target"
    ),
    renamed=RENAMED,
    dropped=(*DROPPED, *COMMON),
    translate=translate,
    defaults={
        "beta": objectives.default_beta,
        "train_on": objectives.default_train_on,
        "lora_rank": 8,
        "lora_alpha": _twice_the_rank,
        "lora_dropout": 0.0,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_length": 2048,
        "truncation_strategy": "right",
        "val_size": 0.0,
        "optim": "adamw_torch",
    },
)
