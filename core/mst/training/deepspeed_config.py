"""DeepSpeed's configuration of a plan, and what a user's own file says against the plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mst.configuration import ZERO_CHOICES, ZERO_STAGES
from mst.errors import PlanError
from mst.plan import Plan
from mst.request import TrainRequest
from mst.training.precision import FIRST_SCALE, GROWTH_STEPS

# The file in the run directory that holds what DeepSpeed was given.
DEEPSPEED = "deepspeed.json"
# Elements a collective: 200 MB in bfloat16. Integers, because DeepSpeed refuses 1e8 (its issue
# 5252 in LLaMA-Factory, 3224 there): floats have ended in torch.empty(1e8).
BUCKET_ELEMENTS = 100_000_000
# Weights smaller than this stay whole on every device: DeepSpeed's own default.
PERSISTENT_ELEMENTS = 100_000
_INTEGERS = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "sub_group_size",
)
# Sections that would report to a host, print rows, or do what our loop does.
_REFUSED = {
    "optimizer": "mst makes AdamW itself from --learning-rate, --weight-decay and --adam-…",
    "scheduler": "mst sets the rate itself from --lr-scheduler-type and --warmup-ratio",
    "wandb": "it reports to a host",
    "comet": "it reports to a host",
    "tensorboard": "metrics.jsonl in the run directory has every figure",
    "csv_monitor": "metrics.jsonl in the run directory has every figure",
    "elasticity": "a run keeps its devices; --resume takes other ones",
    "autotuning": "`mst plan --compare` lists the ways to train",
    "hybrid_engine": "mst does not generate while it trains",
    "curriculum_learning": "mst orders the rows itself",
    "data_efficiency": "mst orders the rows itself",
    "amp": "it needs NVIDIA's apex; --dtype says in what is computed",
    "tensor_parallel": "mst cuts a job over devices by rows, not by layers",
    "flops_profiler": "it prints the model",
    "dump_state": "it prints the configuration of every rank",
}


def deepspeed_config(plan: Plan, request: TrainRequest) -> dict[str, Any]:
    """Return what DeepSpeed is given for a plan whose strategy is zero1, zero2 or zero3.

    Gradients add up over as many backward passes as our loop makes before it calls `step`
    (`managed_gradient_accumulation`, DeepSpeed 0.19): ranks with fewer rows make empty ones.

    Args:
        plan: what is to be done.
        request: gradient clipping.

    Raises:
        PlanError: DeepSpeed can't do what the plan says.
    """
    if plan.optim != "adamw_torch":
        raise PlanError(
            f"--optim {plan.optim} was asked for with --deepspeed {plan.strategy}: DeepSpeed shares"
            " out torch's AdamW only. Pass --optim adamw_torch, or --deepspeed off."
        )
    stage = ZERO_STAGES[plan.strategy]
    return {
        "train_micro_batch_size_per_gpu": plan.per_device_train_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "train_batch_size": plan.global_batch,
        "managed_gradient_accumulation": False,
        "gradient_clipping": float(request.max_grad_norm),
        "wall_clock_breakdown": False,
        "zero_optimization": _zero_section(plan, stage),
        # torch's AdamW on the host: DeepSpeed's own needs a compiler on every machine.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **_dtype_sections(plan),
    }


def config_of(plan: Plan, request: TrainRequest) -> dict[str, Any]:
    """Return what DeepSpeed is given for a plan: the user's file, where `--deepspeed` names one.

    Raises:
        PlanError: the file contradicts the plan, or DeepSpeed can't do what the plan says.
    """
    asked = request.deepspeed
    if asked in ZERO_CHOICES:
        return deepspeed_config(plan, request)
    return completed(read_config(Path(asked)), plan, request, asked)


def _zero_section(plan: Plan, stage: int) -> dict[str, Any]:
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        # gloo has no streams to overlap on; stage 1 reduces once, at the end of the step.
        "overlap_comm": stage > 1 and plan.torch_devices[0] != "cpu",
    }
    if stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS // 2,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "sub_group_size": 1_000_000_000,
        }
    if plan.offload != "none":
        section["offload_optimizer"] = _offload(plan)
    if plan.offload == "parameters":
        section["offload_param"] = _offload(plan)
    return section


def _offload(plan: Plan) -> dict[str, Any]:
    pinned = plan.torch_devices[0] != "cpu"
    if plan.offload_dir is None:
        return {"device": "cpu", "pin_memory": pinned}
    return {"device": "nvme", "nvme_path": plan.offload_dir, "pin_memory": pinned}


def _dtype_sections(plan: Plan) -> dict[str, Any]:
    """Return the sections that say in what is computed.

    Under adapters bfloat16 goes through autocast, as in our own loop: the adapters stay float32.
    Whole models are held in 16 bits, with DeepSpeed's float32 copy in shares.
    """
    sections: dict[str, Any] = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
    if plan.compute_dtype == "float16":
        sections["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": int(FIRST_SCALE).bit_length() - 1,
            "loss_scale_window": GROWTH_STEPS,
            "hysteresis": 1,
        }
    elif plan.compute_dtype == "bfloat16" and plan.weights_dtype == "bfloat16" == _held(plan):
        sections["bf16"] = {"enabled": True}
    elif plan.compute_dtype == "bfloat16":
        sections["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            # Its default would send the gradients of linear layers in bfloat16.
            "lower_precision_safe_modules": [],
        }
    return sections


def _held(plan: Plan) -> str:
    """Return the dtype of the weights that are trained."""
    return plan.weights_dtype if plan.tuner == "full" else "float32"


def read_config(path: Path) -> dict[str, Any]:
    """Return a user's DeepSpeed file.

    Raises:
        PlanError: it is not there, not JSON, or no object; says where.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(
            f"--deepspeed {path} can't be read: {error.strerror}. Give a JSON file, or one of auto,"
            " off, zero1, zero2, zero3, zero2_offload, zero3_offload."
        ) from None
    except ValueError as error:
        raise PlanError(
            f"--deepspeed {path} is not JSON: {str(error)[:200]}. Mend it there, or pass"
            " --deepspeed zero2 or zero3 and mst writes one."
        ) from None
    if not isinstance(found, dict):
        raise PlanError(f"--deepspeed {path} holds no JSON object. `mst` writes one for zero2.")
    return found


def stage_of(config: Mapping[str, Any]) -> str:
    """Return what `--deepspeed` would say for a user's file: "zero1" to "zero3", "_offload" added.

    Raises:
        PlanError: it names no stage of ZeRO.
    """
    section = config.get("zero_optimization")
    stage = section.get("stage") if isinstance(section, dict) else None
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        raise PlanError(
            f"the DeepSpeed file's zero_optimization.stage is {stage!r}; mst takes 1, 2 or 3."
            " Without ZeRO pass --deepspeed off."
        )
    assert isinstance(section, dict)
    return f"zero{stage}" + ("_offload" if _wants_offload(section) else "")


def _wants_offload(section: Mapping[str, Any]) -> bool:
    return any(_offload_device(section, name) != "none" for name in _OFFLOADS)


_OFFLOADS = ("offload_optimizer", "offload_param")


def _offload_device(section: Mapping[str, Any], name: str) -> str:
    part = section.get(name)
    return str(part.get("device", "cpu")) if isinstance(part, dict) else "none"


def conflicts(config: Mapping[str, Any], plan: Plan, request: TrainRequest) -> tuple[str, ...]:
    """Return what in a user's DeepSpeed file contradicts the plan, each with its fix.

    "auto" is no conflict: `completed` fills it in.

    Args:
        config: as `read_config` returned it.
        plan: what is to be done.
        request: gradient clipping.
    """
    ours = deepspeed_config(plan, request)
    found = [
        f"{name}: {why}. Remove this section."
        for name, why in _REFUSED.items()
        if _is_on(config.get(name))
    ]
    found += _batch_conflicts(config, ours, plan)
    found += _dtype_conflicts(config, plan)
    clip = config.get("gradient_clipping", "auto")
    if clip != "auto" and clip != ours["gradient_clipping"]:
        found.append(
            f"gradient_clipping is {clip}, the plan's is {request.max_grad_norm:g}. Write"
            f' "auto", or pass --max-grad-norm {clip}.'
        )
    section = config.get("zero_optimization")
    if isinstance(section, dict):
        found += _zero_conflicts(section, plan)
    else:
        found.append(
            f'zero_optimization is missing. Add {{"stage": {ZERO_STAGES[plan.strategy]}}}.'
        )
    return tuple(found)


def _is_on(section: object) -> bool:
    if isinstance(section, dict):
        return bool(section.get("enabled", True))
    return bool(section)


def _batch_conflicts(config: Mapping[str, Any], ours: Mapping[str, Any], plan: Plan) -> list[str]:
    flags = {
        "train_micro_batch_size_per_gpu": "--per-device-train-batch-size",
        "gradient_accumulation_steps": "--gradient-accumulation-steps",
    }
    found = []
    for name, flag in flags.items():
        value = config.get(name, "auto")
        if value not in ("auto", ours[name]):
            found.append(
                f'{name} is {value}, the plan\'s is {ours[name]}. Write "auto", or pass'
                f" {flag} {value}."
            )
    total = config.get("train_batch_size", "auto")
    if total not in ("auto", ours["train_batch_size"]):
        found.append(
            f"train_batch_size is {total}, but {plan.per_device_train_batch_size} rows x"
            f" {plan.gradient_accumulation_steps} micro-batches x {plan.world_size} devices are"
            f' {plan.global_batch}. Write "auto".'
        )
    return found


def _dtype_conflicts(config: Mapping[str, Any], plan: Plan) -> list[str]:
    found = []
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        section = config.get(name)
        on = section.get("enabled", False) if isinstance(section, dict) else "auto"
        if on == "auto":
            continue
        if on and plan.compute_dtype != dtype:
            found.append(
                f"{name} is enabled, but the plan computes in {plan.compute_dtype}. Write"
                f' "enabled": "auto", or pass --dtype {dtype} on a device that has it.'
            )
        if not on and plan.compute_dtype == dtype:
            found.append(
                f'{name} is off, but the plan computes in {dtype}. Write "enabled": "auto", or pass'
                " --dtype float32."
            )
    return found


def _zero_conflicts(section: Mapping[str, Any], plan: Plan) -> list[str]:
    found = []
    stage = section.get("stage")
    if stage != ZERO_STAGES[plan.strategy]:
        found.append(
            f"zero_optimization.stage is {stage}, the plan is {plan.strategy}. Write"
            f" {ZERO_STAGES[plan.strategy]}."
        )
    for name in _INTEGERS:
        value = section.get(name, "auto")
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int)):
            number = f"{value:.0f}" if isinstance(value, float) else "a whole number"
            found.append(
                f"zero_optimization.{name} is {value!r}, which is no whole number (JSON reads 5e8"
                f' as 500000000.0). Write {number}, or "auto".'
            )
    wanted = {
        "offload_optimizer": plan.offload in ("optimizer", "parameters"),
        "offload_param": plan.offload == "parameters",
    }
    for name, want in wanted.items():
        device = _offload_device(section, name)
        if device not in ("none", "cpu", "nvme", "auto"):
            found.append(f"zero_optimization.{name}.device is {device!r}. Write cpu or nvme.")
        elif (device != "none") != want:
            says = f"offloads to {device}" if device != "none" else "does not offload"
            fix = "Remove it" if device != "none" else f'Add {{"{name}": {{"device": "cpu"}}}}'
            found.append(
                f"zero_optimization.{name} {says}, the plan's offload is {plan.offload}. {fix}, or"
                f" pass --deepspeed {plan.strategy} and mst writes the file."
            )
        elif device == "nvme" and plan.offload_dir is None:
            found.append(f"zero_optimization.{name} is nvme. Name the disk with --offload-dir DIR.")
    return found


def completed(
    config: Mapping[str, Any], plan: Plan, request: TrainRequest, name: str = "the file"
) -> dict[str, Any]:
    """Return a user's configuration with "auto" and what is missing filled in from the plan.

    Args:
        config: as `read_config` returned it.
        plan: what is to be done.
        request: gradient clipping.
        name: of the file, for the message.

    Raises:
        PlanError: it contradicts the plan; names each conflict with its fix.
    """
    found = conflicts(config, plan, request)
    if found:
        lines = "\n".join(f"  - {each}" for each in found)
        raise PlanError(f"--deepspeed {name} contradicts the plan:\n{lines}")
    return _filled(config, deepspeed_config(plan, request))


def _filled(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for name, value in theirs.items():
        if name in _REFUSED or value == "auto":
            continue
        mine = ours.get(name)
        if isinstance(value, dict):
            merged[name] = _filled(value, mine if isinstance(mine, dict) else {})
        else:
            merged[name] = value
    # How the loop drives DeepSpeed is not the file's to say; nor is the dtype, which was checked.
    for name in ("managed_gradient_accumulation", "bf16", "fp16", "wall_clock_breakdown"):
        if name in ours:
            merged[name] = ours[name]
    return merged
