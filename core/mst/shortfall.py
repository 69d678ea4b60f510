"""What to say when no configuration fits: what is short, by how much, and what would do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mst.candidates import candidates
from mst.catalogue import known_chips
from mst.configuration import checkpointing_option
from mst.errors import PlanError
from mst.memory_bounds import MEMORY_SHARE, budget_binds, scarcest, usable_bytes
from mst.plan import Alternative, MemoryForecast
from mst.quantities import gib
from mst.ranking import Candidate, alternative, choose
from mst.reasons import way
from mst.space import Space
from mst.training.batches import layout_of
from mst.workload import step_shapes

# Changes that are named; more would be a list to choose from, not advice.
CHANGES = 3
# Rows shorter than this carry little; and lengths are multiples of it.
LENGTH_STEP = 64
MOST_DEVICES = 16
PARTS = {
    "weights_bytes": "weights",
    "optimizer_bytes": "optimizer states",
    "gradients_bytes": "gradients",
    "activations_bytes": "activations",
    "logits_bytes": "logits",
    "trainable_bytes": "adapters and their casts",
    "buffers_bytes": "buffers of the collectives",
    "runtime_bytes": "libraries",
}


class NothingFits(PlanError):
    """No configuration fits.

    Attributes:
        alternatives: all that were looked at.
    """

    def __init__(self, message: str, alternatives: tuple[Alternative, ...]) -> None:
        """Keep what was looked at, so that it can be shown."""
        super().__init__(message)
        self.alternatives = alternatives


def nothing_fits(space: Space, found: Sequence[Candidate]) -> NothingFits:
    """Return the error: the least that was found, what it lacks, and changes that would do.

    Args:
        space: what could be chosen from.
        found: all candidates, none of which fits.
    """
    looked_at = tuple(alternative(each, space.model) for each in found)
    return NothingFits(_words(space, found), looked_at)


def _words(space: Space, found: Sequence[Candidate]) -> str:
    # What the device itself lacks is the plainer answer; offloading is among the changes.
    whole = [each for each in found if each.configuration.offload == "none"] or found
    least = min(whole, key=lambda each: each.memory.peak_bytes)
    made = least.configuration
    quantized = {"nf4": "NF4 ", "int8": "int8 "}.get(made.quantization, "")
    switch = checkpointing_option(made.checkpointing, made.checkpointed_layers)
    lines = (
        f"no plan for {_asked(space)} of {space.model.path} fits: {_bound(space)}."
        f" The smallest is {made.tuner}"
        f" ({way(least)}, micro-batch {made.micro_batch}, gradient checkpointing {switch}), which"
        f" {least.why_not}. The {quantized}{_largest_part(least.memory)}."
    )
    changes = []
    for each in _changes(space, least, found):
        changes.append(each)
        if len(changes) == CHANGES:
            break
    if not changes:
        return f"{lines} No smaller request helps; take a smaller model."
    return f"{lines} What would do: {'; or '.join(changes)}."


def _bound(space: Space) -> str:
    device, budget = scarcest(space), space.budget_bytes
    free = gib(device.memory_free_bytes or 0)
    if budget is None or not budget_binds(space):
        return f"{device.name} has {free} free, of which {MEMORY_SHARE:.0%} may be planned"
    there = "" if device.memory_free_bytes is None else f", which has {free} free"
    return (
        f"--memory-budget {space.request.memory_budget} leaves a plan {gib(budget)} of"
        f" {device.name}{there}"
    )


def _asked(space: Space) -> str:
    tuner = space.request.tuner
    return "tuning" if tuner == "auto" else f"{tuner} tuning"


def _largest_part(memory: MemoryForecast) -> str:
    name = max(PARTS, key=lambda each: int(getattr(memory, each)))
    return f"{PARTS[name]} alone take {gib(getattr(memory, name))}"


def _changes(space: Space, least: Candidate, found: Sequence[Candidate]) -> Iterator[str]:
    """Yield changes that would make it fit, the easiest first."""
    yield from _larger_budget(space, least)
    for words, changed in _relaxed(space):
        if (taken := _fits(changed)) is not None:
            yield f"{words} ({gib(taken.memory.peak_bytes)} a device)"
    if "nf4" not in space.capabilities.quantization and space.request.tuner != "full":
        able = replace(space.capabilities, quantization=("none", "nf4"))
        asked = replace(space.request, tuner="auto", quant_bits=None)
        if (taken := _fits(replace(space, capabilities=able, request=asked))) is not None:
            yield (
                f"4-bit weights ({gib(taken.memory.peak_bytes)} a device), which this device does"
                " not offer here: `mst doctor` says whether bitsandbytes is what is missing"
            )
    yield from _with_host(space, found)
    yield from _shorter(space)
    yield from _more_devices(space)
    yield from _larger_chip(space, least)


def _larger_budget(space: Space, least: Candidate) -> Iterator[str]:
    """Yield the smallest budget that would do, where what is free allows it."""
    if budget_binds(space):
        needed = _on_machine(space, least)
        unit, words = (2**20, "MiB") if needed < 2**30 else (2**30, "GiB")
        tenths = math.ceil(needed * 10 / unit)
        larger = replace(space, budget_bytes=tenths * unit // 10)
        if _fits(larger) is not None:
            yield f"--memory-budget {tenths / 10:g}{words}"


def _on_machine(space: Space, candidate: Candidate) -> int:
    """Return the memory that a budget would have to hold: on a CPU that of all processes."""
    shared = candidate.devices if space.capabilities.torch_device == "cpu" else 1
    return candidate.memory.peak_bytes * shared


def _fits(space: Space) -> Candidate | None:
    return choose(candidates(space), None)


def _relaxed(space: Space) -> Iterator[tuple[str, Space]]:
    """Yield the request with one or two explicit choices taken back, and how to say it."""
    request = space.request
    options: list[tuple[str, dict[str, Any]]] = []
    if request.gradient_checkpointing not in ("auto", "on"):
        options.append(("--gradient-checkpointing on", {"gradient_checkpointing": "on"}))
    if request.activation_offloading == "off":
        options.append(("--activation-offloading auto", {"activation_offloading": "auto"}))
    if (request.per_device_train_batch_size or 1) > 1:
        smaller = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": None}
        options.append(("--per-device-train-batch-size 1", smaller))
    if request.tuner == "full":
        options.append(("--tuner lora", {"tuner": "lora"}))
    if request.tuner in ("full", "lora") and "nf4" in space.capabilities.quantization:
        options.append(("--tuner qlora", {"tuner": "qlora"}))
    if request.quant_bits == 8 and "nf4" in space.capabilities.quantization:
        options.append(("--quant-bits 4", {"quant_bits": 4}))
    if request.optim == "adamw_torch" and request.tuner == "full":
        options.append(("--optim auto", {"optim": "auto"}))
    for count in (1, 2):
        for chosen in itertools.combinations(options, count):
            changes = {key: value for _, change in chosen for key, value in change.items()}
            if len(changes) == sum(len(change) for _, change in chosen):
                words = " ".join(each for each, _ in chosen)
                yield words, replace(space, request=replace(request, **changes))
    if space.zero != "auto":
        yield "--deepspeed auto", replace(space, zero="auto")
    if request.nproc_per_node is not None and request.nproc_per_node < len(space.devices):
        asked = replace(request, nproc_per_node=None)
        yield "no --nproc-per-node", replace(space, request=asked)


def _with_host(space: Space, found: Sequence[Candidate]) -> Iterator[str]:
    """Yield how much of the host's memory would do, where only that is missing."""
    enough = [
        each.memory.host_bytes
        for each in found
        if each.memory.host_bytes
        and each.memory.peak_bytes <= (usable_bytes(space, each.devices) or 0)
    ]
    if enough:
        needed = min(enough) / MEMORY_SHARE
        here = "whose size is not known" if space.host_bytes is None else "which has less"
        yield f"{gib(needed)} of memory free on the host, {here}, to offload to"


def _shorter(space: Space) -> Iterator[str]:
    """Yield the longest --max-length that fits, when cutting the rows helps."""
    lengths = range(LENGTH_STEP, space.data.max_length, LENGTH_STEP)

    def fits(length: int) -> bool:
        return _fits(_cut(space, length)) is not None

    longest = last_holding(lengths, fits)
    if longest is not None:
        yield f"--max-length {longest} (the longest row has {space.data.longest})"


def last_holding(values: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """Return the largest value for which `holds`, which is true up to some value, or None."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if holds(values[middle]):
            low = middle + 1
        else:
            high = middle
    return values[low - 1] if low else None


def _cut(space: Space, length: int) -> Space:
    data = space.data
    parts = tuple(tuple(min(one, length) for one in each) for each in data.parts)
    whole = tuple(map(sum, parts)) or tuple(min(each, length) for each in data.lengths)
    shorter = replace(
        data,
        lengths=whole,
        parts=parts,
        label_tokens=tuple(map(min, data.label_tokens, whole)),
        max_length=length,
    )
    layout = layout_of(not data.objective.scores, space.attention)
    return replace(space, data=shorter, shape=step_shapes(shorter, space.request, layout))


def _more_devices(space: Space) -> Iterator[str]:
    """Yield how many devices of the same kind would do."""
    able = space.capabilities
    if able.torch_device == "cpu" or "ddp" not in able.strategies:
        return
    count = len(space.devices) * 2
    while count <= MOST_DEVICES:
        first = space.devices[0]
        devices = tuple(replace(first, index=index) for index in range(count))
        asked = replace(space.request, nproc_per_node=count)
        zero = "auto" if space.zero == "off" else space.zero
        if (taken := _fits(replace(space, devices=devices, request=asked, zero=zero))) is not None:
            made = taken.configuration
            yield f"{count} of {first.name} ({made.tuner}, {way(taken)})"
            return
        count *= 2


def _larger_chip(space: Space, least: Candidate) -> Iterator[str]:
    """Yield the smallest chip of the catalogue that holds the least candidate."""
    device, budget = space.devices[0], space.budget_bytes
    if budget is not None and budget < _on_machine(space, least):
        return  # it would not be filled
    needed = least.memory.peak_bytes / MEMORY_SHARE
    chips = [
        (chip.memory_bytes.value, chip.name)
        for chip in known_chips()
        if chip.backend == device.backend
        and chip.memory_bytes is not None
        and chip.memory_bytes.value >= needed
        and space.dtype in chip.dtypes
    ]
    if chips:
        yield f"a chip with {gib(needed)} free, such as {min(chips)[1]}"
    elif device.backend == "cpu":
        yield f"a machine with {gib(needed)} of memory free"
