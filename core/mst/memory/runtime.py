"""What no tensor holds: libraries, contexts, allocators' slack and kernels' scratch space."""

from __future__ import annotations

from collections.abc import Iterator

from mst.memory.phases import Step
from mst.memory.shape import mask_values

# Resident size of Python with torch, transformers and peft imported, before a model is loaded, on
# Linux x86_64 with torch 2.13.0 (CPU build), transformers 5.23.0 and peft 0.21.2: 428 to 432 MiB in
# benchmarks/memory_forecast.py.
LIBRARIES_BYTES = 432 * 2**20
# The model's and PEFT's code, the kernels that oneDNN compiles and their scratch space: what is
# resident beyond tensors where no tensor is small, 40 to 90 MiB in benchmarks/memory_forecast.py.
KERNELS_BYTES = 75 * 2**20
# glibc maps allocations from this size on and gives them back at once (M_MMAP_THRESHOLD); smaller
# ones come from the heap, whose holes stay resident. Pages that are mapped anew are cleared anew: a
# step of SmolLM2 with 1,024 tokens took 1.8 times as long with a tight heap as with a roomy one
# (344 and 634 tokens/s; compiled 549 and 793), on two AMX cores of a virtual machine, and peaked at
# 1.57 instead of 2.27 GiB (compiled 1.46 and 1.75). On an AMD EPYC (Zen 5) it took as long.
MAPPED_FROM_BYTES = {"tight": 2**20, "roomy": 2**25}
# From how much free memory at the heap's end malloc gives it back (M_TRIM_THRESHOLD): a roomy heap
# never does. At 2**25 a compiled step of SmolLM2 took 34,000 pages anew, 0.08 s of its 1.5 in the
# system; without, 100 once the heap has grown, and the same peak (two cores of an AMD EPYC, Zen 4).
TRIMMED_FROM_BYTES = {"tight": 2**20, "roomy": 2**40}
# Of small tensors, what lies between them in the heap once it has stopped growing. What they have
# freed also serves larger tensors, since malloc maps only what no hole has room for; so holes grow
# over the first steps, and again with each larger shape: in the demo from 224 MiB in the first step
# to 295 in the fourth. After twelve steps of one shape 1.4 to 2.0 fit, after the demo's 75 of many
# shapes 2.2 (torch 2.13.0, a core of an Intel Xeon with AMX). Mapping from 128 KiB on leaves no
# holes, and the demo's first 20 steps peak at 1.34 GiB instead of 1.63, but with a third fewer
# tokens a second: pages that are mapped anew are cleared anew.
# In a roomy heap, where nearly all tensors are small, 0.5 to 1.3 of what is kept lies between them
# after twelve steps; where layers are recomputed, five to seven of them (memory_forecast.py).
HEAP_HOLES = {"tight": 2.15, "roomy": 1.0}
RECOMPUTED_HOLES = {"tight": 2.15, "roomy": 6.0}
# Where all that layers keep lies in the tight heap and every micro-batch has one shape, what a step
# has freed fits the next one's tensors: holes are half of what is kept, full grown in the second
# step. Each further length leaves its kernels there, and pieces that fit no other.
ALIKE_HOLES = 0.6
# Compiled layers free next to nothing between the tensors that they keep, so a roomy heap has few
# holes: with these, seven cases of benchmarks/memory_forecast.py are within 4 %, full tuning 12 %
# too high. What the compiler itself took is free again by then.
COMPILED_HOLES = 0.1
# Compiled layers on NF4 weights: of two cases one was 74 MB too low without this, one 72 too high.
COMPILED_NF4_BYTES = 64 * 2**20

# One process's context on the device, CUDA kernels' code included: a table, not measured here.
# torch's documentation of CUDA memory speaks of "several hundred MiB"; nvidia-smi shows 300 to 600.
CONTEXT_BYTES = {"cuda": 500 * 2**20, "npu": 500 * 2**20}
# torch's caching allocator takes 2 MiB segments for tensors up to 1 MiB, 20 MiB for those under
# 10 MiB, else multiples of 2 MiB (c10/core/AllocatorConfig.h); what is cut off stays with it.
SMALL_SEGMENT_BYTES = 2 * 2**20
LARGE_SEGMENT_BYTES = 20 * 2**20
SEGMENTED = ("cuda", "npu", "xpu")
# Of the tensors' bytes, in segments that are only partly used; a table value, not measured here.
SEGMENT_SHARE = 0.03


def context_bytes(device: str) -> int:
    """Return what the driver and its libraries take on a device of this type."""
    return CONTEXT_BYTES.get(device, 0)


def segments_bytes(tensors: int, device: str) -> int:
    """Return what torch's caching allocator reserves beyond the tensors."""
    if device not in SEGMENTED:
        return 0
    return LARGE_SEGMENT_BYTES + SMALL_SEGMENT_BYTES + int(tensors * SEGMENT_SHARE)


def heap_environment(heap: str) -> dict[str, str]:
    """Return glibc's variables for a heap of this kind; see malloc(3) and mallopt(3)."""
    return {
        "MALLOC_MMAP_THRESHOLD_": str(MAPPED_FROM_BYTES[heap]),
        "MALLOC_TRIM_THRESHOLD_": str(TRIMMED_FROM_BYTES[heap]),
    }


def heap_bytes(step: Step, heap: str, whole: bool, compiled: bool = False) -> int:
    """Return what the CPU's heap has beyond the tensors that are alive at the peak.

    Args:
        step: of the forecast.
        heap: "tight" or "roomy".
        whole: every layer's kept tensors are counted as alive.
        compiled: the layers are.
    """
    mapped_from = MAPPED_FROM_BYTES[heap]
    kept = list(_kept_tensors(step))
    small = sum(size for size in kept if size < mapped_from)
    found = float(KERNELS_BYTES)
    if step.recomputed:
        stream = step.shape.tokens * step.layer.hidden * step.scheme.stream
        inputs = stream * step.recomputed if stream < mapped_from else 0
        found += RECOMPUTED_HOLES[heap] * small + inputs
    holes = COMPILED_HOLES if compiled and heap == "roomy" else HEAP_HOLES[heap]
    if heap == "tight" and step.shape.alike and max(kept) < mapped_from:
        holes = ALIKE_HOLES
    return int(found + small * (step.layers - step.recomputed) * (holes if whole else 1))


def _kept_tensors(step: Step) -> Iterator[int]:
    """Yield the size of each tensor that a layer keeps, as `mst.memory.activations` adds them."""
    layer, scheme, tokens = step.layer, step.scheme, step.shape.tokens
    c, h = scheme.compute, layer.hidden
    # As `mst.memory.activations` has it: keys are repeated for each query head, but not in blocks.
    repeated = scheme.attention == "eager" or (
        scheme.attention != "blocks" and mask_values(step.shape)
    )
    keys = layer.queries if repeated else layer.keys
    for readers in (layer.attention_inputs, layer.mlp_inputs):
        yield tokens * h * (scheme.stream if layer.layer_norm else 4)
        if scheme.full:
            yield tokens * h * scheme.stream
        yield from [tokens * h * c] * (readers if scheme.casts else 1)
    yield tokens * layer.queries * c
    yield tokens * layer.queries * c
    yield from [tokens * keys * c] * 2
    yield from [tokens * layer.inner * c] * (4 if layer.gated else 2)
    if layer.qk_norm:
        yield from (tokens * layer.queries * 4, tokens * layer.keys * 4)
    if scheme.casts and scheme.full:
        yield from [h * layer.queries * c] * 2
        yield from [h * layer.keys * c] * 2
    if not scheme.full:
        yield from [tokens * scheme.rank * c] * round(layer.adapters)
