"""Settings that no tool's translation reads one by one: renamed, or dropped for a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mst.foreign.draft import Draft, Effect, number


@dataclass(frozen=True)
class Dropped:
    """Keys that aren't carried over, for one reason.

    Attributes:
        reason: why, for the report.
        keys: their keys separated by spaces; `wandb_*` is a prefix, and `size=1` a key that says
            nothing where it has that value.
        effect: what leaving them out does to the tuned model.
    """

    reason: str
    keys: str
    effect: Effect = "none"


NOTHING_IS_REPORTED = "mst reports nothing anywhere; `mst runs show` draws the curves"
NEVER_UPLOADED = "mst uploads nothing and downloads nothing"
OWN_KERNELS = "the kernels are those of the model and the backend"
SAVED_ANYWAY = "mst writes its metrics, curves and checkpoints without being told"
NO_GENERATION = "mst generates nothing while it trains"

# Keys of transformers' Trainer and of what all four tools put around it.
COMMON = (
    Dropped(
        NOTHING_IS_REPORTED,
        "report_to run_name logging_dir wandb_* swanlab_* mlflow_* comet_* trackio_* neptune_*"
        " use_wandb use_swanlab use_mlflow use_comet use_trackio use_tensorboard project"
        " hf_mlflow_log_artifacts otel_* use_otel_metrics ray_run_name",
    ),
    Dropped(
        NEVER_UPLOADED,
        "push_to_hub push_to_hub_* hub_* hf_hub_token ms_hub_token om_hub_token hf_use_auth_token"
        " token use_auth_token use_hf push_dataset_to_hub cache_dir model_revision",
    ),
    Dropped("code from a model's directory is refused", "trust_remote_code"),
    Dropped(
        OWN_KERNELS,
        "use_liger_kernel enable_liger_kernel liger_* use_unsloth use_unsloth_gc torch_compile"
        " torch_compile_* tf32 use_kernels use_cache dpo_use_liger_kernel",
    ),
    Dropped("mst reads, shuffles and prepares data by itself", "dataloader_* dataset_num_proc"),
    Dropped(
        "only the last rows of an epoch are concerned: mst trains on them", "drop_last", "check"
    ),
    Dropped(
        SAVED_ANYWAY,
        "logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica"
        " log_on_each_node disable_tqdm overwrite_output_dir save_only_model save_safetensors"
        " safe_serialization max_shard_size save_on_each_node plot_loss"
        " include_num_input_tokens_seen include_tokens_per_second include_tkps"
        " include_effective_tokens_per_second do_train do_eval do_predict skip_memory_metrics debug"
        " prediction_loss_only per_device_eval_batch_size eval_batch_size eval_accumulation_steps"
        " eval_on_start eval_delay eval_do_concat_batches eval_use_gather_object"
        " batch_eval_metrics include_for_metrics save_first_step profiler_* local_rank"
        " remove_unused_columns length_column_name label_names greater_is_better use_cpu"
        " torch_empty_cache_steps gradient_checkpointing_kwargs activation_offloading"
        " auto_find_batch_size enable_jit_checkpoint logging_first_step use_reentrant_gc"
        " average_tokens_across_devices low_cpu_mem_usage full_determinism",
    ),
    Dropped(
        "the processes find each other by mst's own means",
        "ddp_* parallelism_config accelerator_config ray_* use_ray data_shared_file_system"
        " world_size device_map max_memory gpu_memory_limit",
    ),
    Dropped(
        "mst shares a job by DDP or DeepSpeed ZeRO, which train the same",
        "fsdp fsdp_* dp_shard_size=1 dp_replicate_size=1",
    ),
    Dropped(
        "mst doesn't split a sequence or a layer over devices",
        "sequence_parallel_size=1 context_parallel_size=1 tensor_parallel_size=1"
        " sequence_parallel_degree=1 expert_parallel_size=1 heads_k_stride ring_attn_func",
    ),
    Dropped("a checkpoint of another tool can't be continued", "ignore_data_skip"),
    Dropped("mst adds no noise to embeddings", "neftune_noise_alpha", "changes"),
    Dropped("mst's loss has no such term", "label_smoothing_factor", "changes"),
    Dropped(
        "mst's schedules take no further settings",
        "lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio lr_quadratic_warmup"
        " lr_div_factor lr_groups embedding_lr embedding_lr_scale",
        "changes",
    ),
    Dropped("AdamW takes no further settings", "optim_args optim_target_modules", "changes"),
    Dropped("mst has one learning rate", "loraplus_lr_ratio lorap_lr_ratio", "changes"),
    Dropped("mst trains no layers beside the adapters", "lora_modules_to_save", "changes"),
    Dropped("mst adapts layers by name only", "lora_target_parameters", "changes"),
    Dropped("rows come in an order drawn from `seed`", "data_seed group_by_length", "check"),
    Dropped("rows are drawn in random order", "train_sampling_strategy=random", "changes"),
    Dropped(
        "the losses of experts' routers are the model's own", "router_aux_loss_coef", "changes"
    ),
)


def harmless(value: Any, unless: str) -> bool:
    """Return whether a value leaves a setting off, so that dropping it is no news."""
    if unless and value not in (None, ""):
        given, off = number(value), number(unless)
        return str(value).lower() == unless if off is None else given == off
    if value in (None, False, "", [], {}, 0, "0") or str(value).lower() in ("none", "no", "false"):
        return True
    return isinstance(value, (list, tuple)) and all(str(each).lower() == "none" for each in value)


def _rule(key: str, rules: Sequence[Dropped]) -> tuple[Dropped, str] | None:
    """Return the rule for a key and the value that leaves it off; exact keys before prefixes."""
    specs = [(*spec.partition("=")[::2], rule) for rule in rules for spec in rule.keys.split()]
    for exact in (True, False):
        for pattern, off, rule in specs:
            if key == pattern if exact else fnmatchcase(key, pattern):
                return rule, off
    return None


def apply(draft: Draft, renamed: Mapping[str, str], rules: Sequence[Dropped]) -> list[str]:
    """Deal with all keys that are still untaken, and return those that no rule knows."""
    unknown = []
    for key, value in draft.given.items():
        if key in draft.taken:
            continue
        draft.taken.add(key)
        if value is None:
            continue
        found = _rule(key, rules)
        if key in renamed:
            draft.keep(renamed[key], value, key)
        elif found is None:
            unknown.append(key)
        elif not harmless(value, found[1]):
            draft.drop(key, found[0].reason, found[0].effect)
    return unknown
