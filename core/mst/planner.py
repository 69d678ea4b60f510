"""The planner: a pure function from facts, model, data and request to a plan with reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mst.candidates import Candidate, Space, alternative, candidates, choose, memory_of, within
from mst.compile_choice import compiled_time, compiling
from mst.configuration import ZERO_CHOICES, checkpointing_option
from mst.errors import PlanError
from mst.facts import Capabilities, DeviceFacts, torch_names
from mst.learning_rates import usual_rate
from mst.memory import FLOAT_BYTES
from mst.memory.runtime import heap_environment
from mst.model.facts import ModelFacts, lora_parameters, lora_targets
from mst.offloading_choice import check_offloading
from mst.plan import Plan, Reason
from mst.privacy.confine import check_unused, confined
from mst.quantities import size_bytes
from mst.reasons import (
    batch_reasons,
    budget_reason,
    budget_warning,
    method_reasons,
    offloading_reason,
)
from mst.request import TrainRequest
from mst.saving_choice import saving
from mst.sharing_choice import counted_on, sharing
from mst.shortfall import nothing_fits
from mst.time_forecast import step_timer
from mst.workload import (
    DataFacts,
    epoch_items,
    layout_in,
    mean_label_tokens,
    mean_length,
    spared_shares,
    step_shapes,
    total_steps,
    train_rows,
)

# What a weight can store (Allen-Zhu and Li 2024, "Physics of Language Models", part 3.3), against
# about one bit that a label token teaches; past it LoRA falls behind full tuning (Schulman et al.).
BITS_PER_WEIGHT = 2


def _dtype(device: DeviceFacts, asked: str) -> tuple[str, Reason | None]:
    if asked != "auto":
        if asked not in device.dtypes:
            raise PlanError(
                f"--dtype {asked} was asked for; {device.name} trains in"
                f" {', '.join(device.dtypes)}. Pass one of these, or --dtype auto."
            )
        return asked, None
    known = [each for each in device.dtypes if each in FLOAT_BYTES]
    if not known:
        raise PlanError(
            f"{device.name} offers {', '.join(device.dtypes) or 'no dtype'}; mst trains in"
            f" {', '.join(FLOAT_BYTES)}. Choose another --device (`mst devices` lists them)."
        )
    features = f" ({', '.join(device.features)})" if device.features else ""
    return known[0], Reason("dtype", known[0], f"the fastest that {device.name} has{features}")


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


def _preferred_tuner(space: Space) -> tuple[str | None, str]:
    """Return a tuner that the data asks for, and why; None when speed may decide."""
    request = space.request
    if request.tuner != "auto" or request.use_dora or request.use_rslora:
        return None, ""
    if space.data.objective.reference or space.data.sequences > 1:
        return None, ""  # a comparison teaches about a bit, not a bit a token
    if space.data.images:
        return None, ""
    targets = lora_targets(space.model, request.target_modules)
    capacity = BITS_PER_WEIGHT * lora_parameters(targets, request.lora_rank)
    labels = round(mean_label_tokens(space.data) * epoch_items(space.data))
    if labels <= capacity:
        return None, ""
    rank = request.lora_rank * -(-labels // max(1, capacity))
    return "full", (
        f"{labels:,} label tokens are more than adapters of rank {request.lora_rank} can take up"
        f" (about {capacity:,}); --tuner lora --lora-rank {rank} would hold them"
    )


def _label_accuracy(request: TrainRequest, data: DataFacts) -> tuple[bool, Reason | None]:
    if request.label_accuracy == "off":
        return False, None
    possible = data.answers is not None and data.val_rows > 0
    if request.label_accuracy == "on" and not possible:
        raise PlanError(
            "--label-accuracy on was asked for; the data has"
            f" {data.answers or 'too many'} distinct answers and {data.val_rows} held-out rows."
            " It needs one short answer a row out of at most 64, and --val-size above 0."
        )
    if not possible:
        return False, None
    why = f"the answers are {data.answers} distinct ones, so accuracy can be counted"
    return True, Reason("label_accuracy", "on", why)


def _warnings(request: TrainRequest, data: DataFacts, steps: int, global_batch: int) -> list[str]:
    warnings = []
    if data.deleted:
        of = "" if data.sampled_from is None else f" of {len(data.lengths) + data.deleted}"
        warnings.append(
            f"{data.deleted}{of} rows are longer than {data.max_length} tokens (the longest has"
            f" {data.longest}) and are left out; --max-length or --truncation-strategy right"
            " would keep them"
        )
    if data.unusable:
        warnings.append(
            f"{data.unusable} rows are left out, for {request.task} can't learn from them: their"
            " answers are the same, or beyond --max-length"
        )
    if request.early_stopping_patience is not None and not data.val_rows:
        warnings.append("early stopping has no held-out rows to look at; pass --val-size")
    if steps * global_batch < epoch_items(data):
        what = "rows" if data.packed_rows is None else "blocks"
        warnings.append(
            f"{steps} steps of {global_batch} {what} see only part of {epoch_items(data)} {what}"
        )
    return warnings


def _longest(data: DataFacts) -> str:
    if data.sampled_from is None:
        return f"the longest row has {data.longest}"
    return f"rows are streamed; the longest of {len(data.lengths)} looked at has {data.longest}"


def _packing_reason(data: DataFacts) -> Reason | None:
    if data.packed_rows is None:
        return None
    filled = mean_length(data) / data.max_length
    why = (
        f"{data.packed_rows} rows fill {len(data.lengths)} blocks of {data.max_length} tokens to"
        f" {filled:.0%}; batch sizes count blocks"
    )
    return Reason("packing", "on", why)


def _images_reason(data: DataFacts) -> Reason | None:
    if not data.images:
        return None
    why = "adapters in the language model learn; the tower that sees them and its projector don't"
    return Reason("images", str(data.images), why)


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


def open_space(
    devices: Sequence[DeviceFacts],
    capabilities: Sequence[Capabilities],
    model: ModelFacts,
    data: DataFacts,
    request: TrainRequest,
    host_bytes: int | None = None,
    zero: str | None = None,
) -> Space:
    """Return what can be chosen from; arguments are those of `plan`.

    Raises:
        PlanError: an explicit choice can't be met.
    """
    if request.dp_epsilon is None:
        check_unused(request)
    else:
        request = confined(request, data)
    zero = zero or request.deepspeed
    asked = request.nproc_per_node
    if asked is None:
        # A slower neighbour would hold the others up.
        alike = [
            one for one in devices if (one.name, one.arch) == (devices[0].name, devices[0].arch)
        ]
        devices = alike
    _check_context(model, data)
    _check_layers(model, request.gradient_checkpointing)
    first, able = devices[0], capabilities[0]
    if (asked or 1) * request.nnodes > 1:
        for each, one in zip(devices, capabilities, strict=False):
            if "ddp" not in one.strategies:
                raise PlanError(
                    f"--nproc-per-node {asked or 1} was asked for; {each.name} can do"
                    f" {', '.join(one.strategies)}, which is not ddp. Pass --nproc-per-node 1."
                )
    _check_method(request, first, able, zero)
    _check_objective(request, data, zero)
    check_offloading(request, first, able)
    dtype, _ = _dtype(first, request.dtype)
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


def plan(
    backend: str,
    devices: Sequence[DeviceFacts],
    capabilities: Sequence[Capabilities],
    environment: Mapping[str, str],
    model: ModelFacts,
    data: DataFacts,
    request: TrainRequest,
    host_bytes: int | None = None,
    zero: str | None = None,
) -> Plan:
    """Choose how to train `model` on `devices`, and say why.

    The fastest configuration is taken whose memory fits with `mst.memory_bounds.MEMORY_SHARE` of
    what is free, and with the request's budget; among those as fast, the simplest.

    Args:
        backend: name of the devices' backend.
        devices: that may be used, best first.
        capabilities: what each can run.
        environment: variables that the backend wants in the worker.
        model: its shape.
        data: the encoded rows' sizes.
        request: what the user asked; explicit choices are kept and only checked.
        host_bytes: free memory of the host, for offloading; None when unknown.
        zero: what `--deepspeed` comes to when it names a file: its stage.

    Raises:
        PlanError: an explicit choice can't be met, or nothing fits; names the nearest that does.
    """
    space = open_space(devices, capabilities, model, data, request, host_bytes, zero)
    found = candidates(space)
    prefer, preference = _preferred_tuner(space)
    chosen = choose(found, prefer)
    if chosen is None:
        raise nothing_fits(space, found)
    return _plan(backend, environment, space, chosen, found, preference)


def _plan(
    backend: str,
    environment: Mapping[str, str],
    space: Space,
    chosen: Candidate,
    found: Sequence[Candidate],
    preference: str,
) -> Plan:
    """Return the chosen candidate as a plan."""
    request, data, made = space.request, space.data, chosen.configuration
    items = epoch_items(data)
    global_batch = made.micro_batch * made.accumulation * made.world_size
    steps = total_steps(request, items, global_batch)
    devices = space.devices[: chosen.devices]
    on_host = space.capabilities.torch_device == "cpu"
    threads = request.threads or _threads(devices[0], chosen.devices)
    if request.threads is not None or (chosen.devices > 1 and on_host):
        environment = {**environment, "OMP_NUM_THREADS": str(threads)}
    compiled, compile_reason = compiling(space, chosen)
    shares, sharing_reason = sharing(space, chosen)
    time, memory = chosen.time, chosen.memory
    async_save, save_reason = saving(space, chosen, replace(made, compiled=compiled))
    if compiled or async_save:
        memory = memory_of(space, replace(made, compiled=compiled, async_save=async_save))
    if compiled and time is not None:
        time = compiled_time(time, steps, made)
    if on_host:
        environment = {**environment, **heap_environment(made.heap)}
    label_accuracy, label_reason = _label_accuracy(request, data)
    rate = request.learning_rate or usual_rate(data, made.tuner)
    _, dtype_reason = _dtype(devices[0], request.dtype)
    alike = within(space, made)
    names = ", ".join(f"{backend}:{each.index}" for each in devices)
    found_reasons = [
        Reason("device", names, f"{devices[0].name}; --device {request.device}"),
        *method_reasons(space, chosen, found, preference),
        dtype_reason,
        budget_reason(space),
        *batch_reasons(space, chosen, alike),
        offloading_reason(space, chosen, alike),
        None
        if request.learning_rate
        else Reason(
            "learning_rate", f"{rate:g}", f"the usual peak for {made.tuner} and {request.task}"
        ),
        None if request.max_length else Reason("max_length", str(data.max_length), _longest(data)),
        _packing_reason(data),
        _images_reason(data),
        compile_reason,
        sharing_reason,
        save_reason,
        label_reason,
        Reason("threads", str(threads), "cores that this process may really use")
        if on_host
        else None,
    ]
    notes = _warnings(request, data, steps, global_batch)
    if preference and made.tuner != "full":
        notes.append(preference)
    if over := budget_warning(space):
        notes.append(over)
    return Plan(
        backend=backend,
        torch_devices=torch_names(devices, space.capabilities),
        distributed_backend=space.capabilities.distributed_backend,
        strategy=made.strategy,
        tuner=made.tuner,
        compute_dtype=made.compute_dtype,
        weights_dtype=made.weights_dtype,
        attention=made.attention,
        threads=threads,
        environment=dict(environment),
        max_length=data.max_length,
        per_device_train_batch_size=made.micro_batch,
        gradient_accumulation_steps=made.accumulation,
        gradient_checkpointing=made.checkpointing,
        checkpointed_layers=made.checkpointed_layers,
        learning_rate=rate,
        train_rows=train_rows(data),
        val_rows=data.val_rows,
        steps_per_epoch=math.ceil(items / global_batch),
        total_steps=steps,
        label_accuracy=label_accuracy,
        memory=memory,
        reasons=tuple(each for each in found_reasons if each is not None),
        warnings=tuple(notes),
        quantization=made.quantization,
        optim=made.optim,
        offload=made.offload,
        offload_dir=request.offload_dir if made.offload != "none" else None,
        nnodes=request.nnodes,
        time=time,
        alternatives=tuple(alternative(each, space.model) for each in found),
        chunked_loss=made.chunked_loss,
        compiled=compiled,
        heap=made.heap,
        prefix_sharing=shares,
        async_save=async_save,
        activation_offloading=made.activation_offloading,
        block_attention=made.block_attention,
    )


def _threads(device: DeviceFacts, ranks: int) -> int:
    """Return the host's threads for each rank: the CPU's cores are shared, a chip needs few."""
    if device.backend != "cpu":
        return 1
    return max(1, (device.compute_units or 1) // ranks)


def as_explicit(request: TrainRequest, plan: Plan) -> TrainRequest:
    """Return the request with the plan's choices spelt out, so that a resumed run keeps them."""
    return replace(
        request,
        tuner=plan.tuner,
        dtype=plan.compute_dtype,
        max_length=plan.max_length,
        per_device_train_batch_size=plan.per_device_train_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        gradient_checkpointing=checkpointing_option(
            plan.gradient_checkpointing, plan.checkpointed_layers
        ),
        nproc_per_node=len(plan.torch_devices),
        quant_bits={"nf4": 4, "int8": 8}.get(plan.quantization),
        optim=plan.optim,
        deepspeed=_zero_option(plan) if request.deepspeed in ZERO_CHOICES else request.deepspeed,
        learning_rate=plan.learning_rate,
        threads=plan.threads if "cpu" in plan.torch_devices else request.threads,
        label_accuracy="on" if plan.label_accuracy else "off",
        chunked_cross_entropy="auto" if plan.chunked_loss else "off",
        torch_compile="on" if plan.compiled else "off",
        prefix_sharing="auto" if plan.prefix_sharing else "off",
        block_attention="auto" if plan.block_attention else "off",
    )


def _zero_option(plan: Plan) -> str:
    """Return what `--deepspeed` would have to say for the plan's strategy."""
    if not plan.strategy.startswith("zero"):
        return "off"
    return plan.strategy + ("_offload" if plan.offload != "none" else "")
