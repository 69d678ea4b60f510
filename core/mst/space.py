"""What a plan can be chosen from: explicit choices are checked, the rest is left open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mst.errors import PlanError
from mst.facts import Capabilities, DeviceFacts
from mst.memory import StepShape
from mst.model.facts import ModelFacts
from mst.offloading_choice import check_offloading
from mst.privacy.confine import check_unused, confined
from mst.quantities import FLOAT_BYTES, size_bytes
from mst.request import TrainRequest
from mst.sharing_choice import counted_on
from mst.time_forecast import Timer, step_timer
from mst.workload import DataFacts, layout_in, spared_shares, step_shapes


@dataclass(frozen=True)
class Space:
    """What candidates are made from; explicit choices of the request are already checked.

    Attributes:
        model: its shape.
        data: the rows.
        request: what is left open is "auto" or None.
        devices: of one backend and one kind, those of this machine.
        capabilities: of the first.
        dtype: of the matrix products.
        attention: transformers' implementation.
        zero: what the user asked of DeepSpeed: "auto", "off" or a stage.
        host_bytes: free memory of the host, for offloading; None when unknown.
        budget_bytes: the most that the user lets a plan take of a device; None for what is free.
        shape: the largest step of a micro-batch and a global batch, from `step_shapes`.
        timer: how long a step takes, from `step_timer`.
        shares: forecasts count on it that what rows begin with alike is computed once.
        spared: the share of a step's tokens that this spares, from `spared_shares`.
    """

    model: ModelFacts
    data: DataFacts
    request: TrainRequest
    devices: tuple[DeviceFacts, ...]
    capabilities: Capabilities
    dtype: str
    attention: str
    zero: str
    host_bytes: int | None
    budget_bytes: int | None
    shape: Callable[[int, int, bool], StepShape]
    timer: Timer
    shares: bool
    spared: Callable[[int, int], float]


def open_space(
    devices: Sequence[DeviceFacts],
    capabilities: Sequence[Capabilities],
    model: ModelFacts,
    data: DataFacts,
    request: TrainRequest,
    host_bytes: int | None = None,
    zero: str | None = None,
) -> Space:
    """Return what can be chosen from; arguments are those of `mst.planner.plan`.

    Raises:
        PlanError: an explicit choice can't be met.
    """
    if request.dp_epsilon is None:
        check_unused(request)
    else:
        request = confined(request, data)
    zero = zero or request.deepspeed
    if request.nproc_per_node is None:
        # A slower neighbour would hold the others up.
        kind = (devices[0].name, devices[0].arch)
        devices = [each for each in devices if (each.name, each.arch) == kind]
    _check_context(model, data)
    _check_layers(model, request.gradient_checkpointing)
    first, able = devices[0], capabilities[0]
    _check_ddp(request, devices, capabilities)
    _check_method(request, first, able, zero)
    _check_objective(request, data, zero)
    check_offloading(request, first, able)
    dtype = _dtype(first, request.dtype)
    if request.dp_epsilon is not None and dtype == "float16":
        raise PlanError(
            f"--dp-epsilon was asked for; the fastest that {first.name} has is float16, whose loss"
            " scaling would depend on the rows. Pass --dtype float32."
        )
    attention = _attention(request, able, dtype)
    budget = request.memory_budget
    return Space(
        model=model,
        data=data,
        request=request,
        devices=tuple(devices),
        capabilities=able,
        dtype=dtype,
        attention=attention,
        zero=zero,
        host_bytes=host_bytes,
        budget_bytes=None if budget is None else size_bytes(budget, "--memory-budget"),
        shape=step_shapes(data, request, layout_in(data, attention, request.padding_free)),
        timer=step_timer(model, request.target_modules, first, nnodes=request.nnodes),
        shares=counted_on(model, data, request, attention),
        spared=spared_shares(data, request, layout_in(data, attention, request.padding_free)),
    )


def _dtype(device: DeviceFacts, asked: str) -> str:
    if asked != "auto":
        if asked not in device.dtypes:
            raise PlanError(
                f"--dtype {asked} was asked for; {device.name} trains in"
                f" {', '.join(device.dtypes)}. Pass one of these, or --dtype auto."
            )
        return asked
    known = [each for each in device.dtypes if each in FLOAT_BYTES]
    if not known:
        raise PlanError(
            f"{device.name} offers {', '.join(device.dtypes) or 'no dtype'}; mst trains in"
            f" {', '.join(FLOAT_BYTES)}. Choose another --device (`mst devices` lists them)."
        )
    return known[0]


def _attention(request: TrainRequest, capabilities: Capabilities, dtype: str) -> str:
    # transformers' name for kernels that take half precision only (its check of `dtype`).
    offered = [
        each
        for each in capabilities.attention
        if dtype != "float32" or not each.startswith("flash_attention")
    ]
    asked = request.attn_implementation
    if asked != "auto" and asked not in offered:
        raise PlanError(
            f"--attn-implementation {asked} was asked for; in {dtype} this device offers"
            f" {', '.join(offered) or 'none'}. Pass one of these, or auto."
        )
    if not offered:
        raise PlanError(f"the backend offers no attention for {dtype}. Pass another --dtype.")
    return offered[0] if asked == "auto" else asked


def _check_ddp(
    request: TrainRequest, devices: Sequence[DeviceFacts], capabilities: Sequence[Capabilities]
) -> None:
    asked = request.nproc_per_node or 1
    if asked * request.nnodes == 1:
        return
    for device, able in zip(devices, capabilities, strict=False):
        if "ddp" not in able.strategies:
            raise PlanError(
                f"--nproc-per-node {asked} was asked for; {device.name} can do"
                f" {', '.join(able.strategies)}, which is not ddp. Pass --nproc-per-node 1."
            )


def _check_method(
    request: TrainRequest, device: DeviceFacts, able: Capabilities, zero: str
) -> None:
    """Raise PlanError when what was asked for is nothing that the device can do."""
    if request.tuner == "full" and request.quant_bits is not None:
        raise PlanError(
            f"--quant-bits {request.quant_bits} freezes the weights that --tuner full would"
            " change. Pass one of the two; --tuner qlora trains adapters on quantized weights."
        )
    if request.tuner == "qlora" or request.quant_bits is not None:
        bits = request.quant_bits or 4
        wanted = "int8" if bits == 8 else "nf4"
        if wanted not in able.quantization:
            raise PlanError(
                f"{bits}-bit weights ({wanted}) were asked for; {device.name} offers"
                f" {', '.join(able.quantization)} here. They need bitsandbytes (python -m pip"
                " install bitsandbytes) and a device that it has kernels for: `mst devices` says."
                " Pass --tuner lora, or another --device."
            )
        if request.use_dora and wanted == "int8":
            raise PlanError("--use-dora works on 4-bit weights, not on 8-bit ones. Leave one out.")
    if request.optim not in ("auto", *able.optimizers):
        raise PlanError(
            f"--optim {request.optim} was asked for; {device.name} offers"
            f" {', '.join(able.optimizers)} here. Pass one of these, or auto."
        )
    stage = zero.partition("_")[0]
    if stage in ("zero1", "zero2", "zero3") and stage not in able.strategies:
        raise PlanError(
            f"--deepspeed {request.deepspeed} was asked for; {device.name} can do"
            f" {', '.join(able.strategies)} here. ZeRO needs DeepSpeed (DS_BUILD_OPS=0 python -m"
            " pip install deepspeed) and a device that it knows. Pass --deepspeed off."
        )


def _check_objective(request: TrainRequest, data: DataFacts, zero: str) -> None:
    """Raise PlanError where the objective can't be met: no place for a reference, no packing."""
    if data.objective.scores and request.packing:
        raise PlanError(
            "--packing was asked for; a reward model scores rows that are padded, each in a line of"
            " its own. Leave --packing out."
        )
    if request.packing and request.padding_free == "off":
        raise PlanError(
            "--packing was asked for, which fills lines with rows end to end, and --padding-free"
            " off, which has each padded in a line of its own. Leave one out."
        )
    if data.objective.samples and zero.startswith("zero"):
        raise PlanError(
            f"--deepspeed {request.deepspeed} was asked for; {request.task} samples answers from a"
            " model that each device holds whole. Pass --deepspeed off: several devices then share"
            " the rows."
        )
    if data.images:
        _check_images(request)
    live = data.objective.reference and not request.precompute_ref_log_probs
    if live and request.tuner == "full" and zero.startswith("zero"):
        other = ", or --precompute-ref-log-probs" if request.task == "dpo" else ""
        raise PlanError(
            f"--task {request.task} compares with a frozen copy of the model, which --deepspeed"
            f" {request.deepspeed} can't share out. Pass --tuner lora, which needs no copy{other}."
        )


def _check_images(request: TrainRequest) -> None:
    if request.packing:
        raise PlanError(
            "--packing was asked for; rows with images are padded, each in a line of its own,"
            " because the model works out their positions. Leave --packing out."
        )
    if request.tuner == "full":
        raise PlanError(
            "--tuner full was asked for; with images the language model learns by adapters, and the"
            " tower that sees them stays as it is. Pass --tuner lora or qlora."
        )


def _check_layers(model: ModelFacts, asked: str) -> None:
    if asked.isdecimal() and not 1 <= int(asked) <= model.layers:
        raise PlanError(
            f"--gradient-checkpointing {asked} was asked for; the model has {model.layers} decoder"
            f" layers. Pass a number from 1 to {model.layers}, on for all of them, or auto."
        )


def _check_context(model: ModelFacts, data: DataFacts) -> None:
    context = model.max_position_embeddings
    if context is not None and data.max_length > context:
        raise PlanError(
            f"--max-length {data.max_length} exceeds the model's context of {context} tokens."
            f" Pass --max-length {context} or less."
        )
