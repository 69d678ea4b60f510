"""Why a plan is as it is: each choice against the best that was rejected, and by how much."""

from __future__ import annotations

from collections.abc import Sequence

from mst.configuration import Configuration, checkpointing_option
from mst.memory_bounds import budget_binds, scarcest, usable_words
from mst.plan import Reason
from mst.quantities import gib
from mst.ranking import Candidate
from mst.space import Space
from mst.workload import mean_length

_SHARED = {
    "single": "one process",
    "ddp": "each process holds the whole model",
    "zero1": "the processes share the optimizer's moments",
    "zero2": "the processes share gradients and moments",
    "zero3": "the processes share weights, gradients and moments",
}
_OFFLOADED = {
    "none": "",
    "optimizer": ", moments on the host",
    "parameters": ", weights and moments on the host",
}


def way(candidate: Candidate) -> str:
    """Return in a few words how a candidate cuts the work over devices."""
    made = candidate.configuration
    many = f" on {candidate.devices} devices" if candidate.devices > 1 else ""
    return f"{made.strategy}{_OFFLOADED[made.offload]}{many}"


def against(chosen: Candidate, other: Candidate) -> str:
    """Return why `other` was not taken: what it lacks, or how much longer it would take."""
    peak = f"{gib(other.memory.peak_bytes)} a device"
    if other.why_not:
        return other.why_not
    if chosen.time is None or other.time is None:
        return f"would need {peak}"
    ratio = other.time.total_seconds / chosen.time.total_seconds
    if ratio > 1.01:
        longer = f"{ratio - 1:.0%} longer" if ratio < 3 else f"{ratio:.1f} times as long"
        return f"would take {longer} and {peak}"
    return f"would take as long, and {peak}"


def method_reasons(
    space: Space, chosen: Candidate, found: Sequence[Candidate], preference: str
) -> list[Reason]:
    """Return why this tuner, strategy and optimizer, against the best of the others.

    Args:
        space: what could be chosen from.
        chosen: one of `found`.
        found: from `mst.candidates.candidates`.
        preference: why the data asks for full tuning, or "".
    """
    reasons = [_tuner_reason(space, chosen, found, preference)]
    made = chosen.configuration
    if made.quantization != "none":
        why = "the frozen linear layers; embeddings, norms and the output head stay as they are"
        reasons.append(Reason("quantization", made.quantization, why))
    same = [each for each in found if each.configuration.tuner == made.tuner]
    reasons.append(_strategy_reason(chosen, same))
    plain = next((one for one in same if one.configuration.optim == "adamw_torch"), None)
    if made.optim != "adamw_torch" and plain is not None:
        why = f"moments in float32: {against(chosen, plain)}"
        reasons.append(Reason("optim", made.optim, why))
    return [each for each in reasons if each is not None]


def _tuner_reason(
    space: Space, chosen: Candidate, found: Sequence[Candidate], preference: str
) -> Reason | None:
    request, tuner = space.request, chosen.configuration.tuner
    if request.tuner != "auto":
        return None
    parts = [preference] if preference and tuner == "full" else []
    if tuner != "full":
        parts.append(f"rank {request.lora_rank}, alpha {request.lora_alpha:g}")
    if request.use_dora or request.use_rslora:
        parts.append("a variant of LoRA was asked for")
    for other in ("lora", "qlora", "full"):
        best = next((one for one in found if one.configuration.tuner == other), None)
        if other != tuner and best is not None:
            parts.append(f"{other} {against(chosen, best)}")
    if tuner == "lora" and not preference:
        parts.append("the data is little enough for adapters, which give a file of megabytes")
    return Reason("tuner", tuner, "; ".join(parts))


def _strategy_reason(chosen: Candidate, same: Sequence[Candidate]) -> Reason | None:
    once = {way(each): each for each in reversed(same)}
    once.pop(way(chosen), None)
    if not once and chosen.configuration.world_size == 1:
        return None
    others = sorted(once.values(), key=lambda each: same.index(each))
    parts = [f"{way(each)} {against(chosen, each)}" for each in others[:3]]
    made = chosen.configuration
    how = _SHARED[made.strategy if made.world_size > 1 else "single"]
    why = "; ".join([how, *parts])
    return Reason("strategy", way(chosen), why)


def batch_reasons(space: Space, chosen: Candidate, within: Sequence[Candidate]) -> list[Reason]:
    """Return why this micro-batch, accumulation and checkpointing, where they were left open.

    Args:
        space: what could be chosen from.
        chosen: the configuration that was taken.
        within: the same way to train with every micro-batch and checkpointing, largest first.
    """
    request, made = space.request, chosen.configuration
    reasons = []
    if request.per_device_train_batch_size is None:
        what = "rows" if space.data.packed_rows is None else "blocks"
        rows = f"{what} have {mean_length(space.data):.0f} tokens on average"
        alike = [one for one in within if _keeps_alike(one.configuration, made)]
        largest = max(alike, key=lambda each: each.configuration.micro_batch)
        if largest.configuration.micro_batch != made.micro_batch:
            rows += f"; {largest.configuration.micro_batch} {what}: {against(chosen, largest)}"
        reasons.append(Reason("per_device_train_batch_size", str(made.micro_batch), rows))
    if request.gradient_accumulation_steps is None:
        rows_a_step = made.micro_batch * made.accumulation * made.world_size
        what = "rows" if space.data.packed_rows is None else "blocks"
        why = f"{rows_a_step} {what} an optimizer step"
        reasons.append(Reason("gradient_accumulation_steps", str(made.accumulation), why))
    if request.gradient_checkpointing == "auto" and request.activation_offloading == "on":
        why = "what is kept on the host is what recomputed layers need"
        reasons.append(Reason("gradient_checkpointing", "on", why))
    elif request.gradient_checkpointing == "auto":
        reasons.append(_checkpointing_reason(space, chosen, within))
    return reasons


def _keeps_alike(one: Configuration, other: Configuration) -> bool:
    return (one.checkpointing, one.activation_offloading) == (
        other.checkpointing, other.activation_offloading
    )  # fmt: skip


def _checkpointing_reason(space: Space, chosen: Candidate, within: Sequence[Candidate]) -> Reason:
    made = chosen.configuration
    without = [one for one in within if not one.configuration.checkpointing]
    least = min(without, key=lambda each: each.memory.peak_bytes)
    peak, theirs = gib(chosen.memory.peak_bytes), gib(least.memory.peak_bytes)
    if not made.checkpointing:
        why = f"needs {peak} without it"
    elif made.checkpointed_layers is None:
        why = f"needs {theirs} without it, {peak} with it"
    else:
        every = min(
            one.memory.peak_bytes
            for one in within
            if one.recomputed == 1 and one.configuration.micro_batch == made.micro_batch
        )
        why = (
            f"recomputes the first {made.checkpointed_layers} of {space.model.layers} layers, as"
            f" few as fit: needs {theirs} with none, {peak} with these, {gib(every)} with all"
        )
    if words := usable_words(space, chosen.devices):
        why += f"; {words}"
    switch = checkpointing_option(made.checkpointing, made.checkpointed_layers)
    return Reason("gradient_checkpointing", switch, why)


def offloading_reason(
    space: Space, chosen: Candidate, within: Sequence[Candidate]
) -> Reason | None:
    """Return why activations lie on the host; None where they don't or the user asked for it.

    Args:
        space: what could be chosen from.
        chosen: the configuration that was taken.
        within: the same way to train with every micro-batch and checkpointing.
    """
    if space.request.activation_offloading == "on" or not (
        chosen.configuration.activation_offloading
    ):
        return None
    least = min(
        one.memory.peak_bytes for one in within if not one.configuration.activation_offloading
    )
    why = (
        f"what recomputed layers keep lies in the host's memory ({gib(chosen.memory.host_bytes)}):"
        f" needs {gib(least)} a device without this, {gib(chosen.memory.peak_bytes)} with it"
    )
    if words := usable_words(space, chosen.devices):
        why += f"; {words}"
    return Reason("activation_offloading", "on", why)


def budget_reason(space: Space) -> Reason | None:
    """Return why no plan takes more memory, where the user's budget is what bounds them."""
    asked, budget = space.request.memory_budget, space.budget_bytes
    if asked is None or budget is None or not budget_binds(space):
        return None
    free = scarcest(space).memory_free_bytes
    of = "" if free is None else f", though {gib(free)} are free"
    return Reason("memory_budget", asked, f"{gib(budget)} of a device may be used at the most{of}")


def budget_warning(space: Space) -> str:
    """Return what to say of a budget that is more than what may be planned anyway, or ""."""
    free = scarcest(space).memory_free_bytes
    if space.budget_bytes is None or free is None or budget_binds(space):
        return ""
    return (
        f"--memory-budget {space.request.memory_budget} is more than there is: of the {gib(free)}"
        f" free, {usable_words(space, 1)}"
    )


def device_reasons(space: Space, backend: str, count: int) -> list[Reason]:
    """Return which devices are used, and why their products have this dtype.

    Args:
        space: what could be chosen from.
        backend: name of the devices' backend.
        count: how many of the space's devices were taken.
    """
    devices, request = space.devices[:count], space.request
    first, names = devices[0], ", ".join(f"{backend}:{each.index}" for each in devices)
    reasons = [Reason("device", names, f"{first.name}; --device {request.device}")]
    if request.dtype == "auto":
        features = f" ({', '.join(first.features)})" if first.features else ""
        why = f"the fastest that {first.name} has{features}"
        reasons.append(Reason("dtype", space.dtype, why))
    return reasons


def data_reasons(space: Space) -> list[Reason]:
    """Return why rows have this length, and what packing and images make of them."""
    data, reasons = space.data, []
    if not space.request.max_length:
        why = f"the longest row has {data.longest}"
        if data.sampled_from is not None:
            looked_at = len(data.lengths)
            why = f"rows are streamed; the longest of {looked_at} looked at has {data.longest}"
        reasons.append(Reason("max_length", str(data.max_length), why))
    if data.packed_rows is not None:
        filled = mean_length(data) / data.max_length
        why = (
            f"{data.packed_rows} rows fill {len(data.lengths)} blocks of {data.max_length} tokens"
            f" to {filled:.0%}; batch sizes count blocks"
        )
        reasons.append(Reason("packing", "on", why))
    if data.images:
        why = (
            "adapters in the language model learn; the tower that sees them and its projector don't"
        )
        reasons.append(Reason("images", str(data.images), why))
    return reasons
