"""The planner: a pure function from facts, model, data and request to a plan with reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mst.candidates import candidates, memory_of, within
from mst.compile_choice import compiled_time, compiling
from mst.errors import PlanError
from mst.facts import Capabilities, DeviceFacts, torch_names
from mst.learning_rates import usual_rate
from mst.liger_choice import fusing
from mst.memory.runtime import heap_environment
from mst.model.facts import ModelFacts, lora_parameters, lora_targets
from mst.plan import Plan, Reason
from mst.ranking import Candidate, alternative, choose
from mst.reasons import (
    batch_reasons,
    budget_reason,
    budget_warning,
    data_reasons,
    device_reasons,
    method_reasons,
    offloading_reason,
)
from mst.request import TrainRequest
from mst.saving_choice import saving
from mst.sharing_choice import sharing
from mst.shortfall import nothing_fits
from mst.space import Space, open_space
from mst.workload import (
    DataFacts,
    epoch_items,
    mean_label_tokens,
    total_steps,
    train_rows,
)

# What a weight can store (Allen-Zhu and Li 2024, "Physics of Language Models", part 3.3), against
# about one bit that a label token teaches; past it LoRA falls behind full tuning (Schulman et al.).
BITS_PER_WEIGHT = 2


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
    compiled, compile_reason = compiling(space, chosen)
    liger, liger_reason = fusing(space, chosen, compiled)
    shares, sharing_reason = sharing(space, chosen)
    async_save, save_reason = saving(space, chosen, replace(made, compiled=compiled))
    label_accuracy, label_reason = _label_accuracy(request, data)
    threads, threads_reason = _threads(space, chosen)
    rate, rate_reason = _learning_rate(request, data, made.tuner)
    time, memory = chosen.time, chosen.memory
    if compiled or async_save:
        memory = memory_of(space, replace(made, compiled=compiled, async_save=async_save))
    if compiled and time is not None:
        time = compiled_time(time, steps, made)
    reasons = [
        *_reasons(backend, space, chosen, found, preference),
        rate_reason,
        *data_reasons(space),
        compile_reason,
        liger_reason,
        sharing_reason,
        save_reason,
        label_reason,
        threads_reason,
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
        environment=_environment(environment, space, chosen, threads),
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
        reasons=tuple(each for each in reasons if each is not None),
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
        liger=liger,
        block_attention=made.block_attention,
    )


def _reasons(
    backend: str, space: Space, chosen: Candidate, found: Sequence[Candidate], preference: str
) -> list[Reason | None]:
    """Return why this candidate, among all and among those of its own way to train."""
    alike = within(space, chosen.configuration)
    return [
        *device_reasons(space, backend, chosen.devices),
        *method_reasons(space, chosen, found, preference),
        budget_reason(space),
        *batch_reasons(space, chosen, alike),
        offloading_reason(space, chosen, alike),
    ]


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


def _learning_rate(
    request: TrainRequest, data: DataFacts, tuner: str
) -> tuple[float, Reason | None]:
    if request.learning_rate:
        return request.learning_rate, None
    rate = usual_rate(data, tuner)
    why = f"the usual peak for {tuner} and {request.task}"
    return rate, Reason("learning_rate", f"{rate:g}", why)


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


def _threads(space: Space, chosen: Candidate) -> tuple[int, Reason | None]:
    """Return the host's threads for each rank: the CPU's cores are shared, a chip needs few."""
    device = space.devices[0]
    cores = (device.compute_units or 1) if device.backend == "cpu" else 1
    threads = space.request.threads or max(1, cores // chosen.devices)
    if space.capabilities.torch_device != "cpu":
        return threads, None
    return threads, Reason("threads", str(threads), "cores that this process may really use")


def _environment(
    environment: Mapping[str, str], space: Space, chosen: Candidate, threads: int
) -> dict[str, str]:
    """Return the variables that the backend wants in the worker, and those of threads and heap."""
    variables = dict(environment)
    on_host = space.capabilities.torch_device == "cpu"
    if space.request.threads is not None or (chosen.devices > 1 and on_host):
        variables["OMP_NUM_THREADS"] = str(threads)
    if on_host:
        variables |= heap_environment(chosen.configuration.heap)
    return variables


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
