"""Every configuration that a request leaves open, with its memory and its time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mst.configuration import ZERO_STAGES, Configuration, recomputed_layers
from mst.facts import Capabilities
from mst.memory import forecast
from mst.memory_bounds import lacks, scarcest
from mst.model.facts import lora_parameters, lora_targets
from mst.offloading_choice import offloading_obstacle
from mst.plan import MemoryForecast
from mst.ranking import Candidate, best, order
from mst.request import TrainRequest
from mst.space import Space
from mst.time_forecast import over_steps
from mst.workload import (
    epoch_items,
    mean_label_tokens,
    mean_length,
    objective_costs,
    rows_a_unit,
    total_steps,
    train_rows,
)

# Row lengths vary, so a micro-batch is sized by tokens: enough to fill the matrix units, few
# enough that the dense mask of a packed batch stays small (SmolLM2 on two cores: 512 to 1024).
MICRO_BATCH_TOKENS_CPU = 640
# An A100's 312 TFLOPS over 2 TB/s want 150 operations a byte: a few thousand tokens a product.
MICRO_BATCH_TOKENS = 8192
GLOBAL_BATCH_ROWS = 16
# A step's noise is the same however many units share it, so private steps hold many: an epoch has
# about so many steps, and a step no more units than that.
PRIVATE_STEPS = 20
PRIVATE_BATCH_UNITS = 1024
# Devices on which torch, or the vendor's extension, has an attention that spares the matrices.
FUSED_ATTENTION = frozenset({"cpu", "cuda", "npu", "xpu"})


def candidates(space: Space) -> list[Candidate]:
    """Return the best candidate of each way to train, those that can be chosen first, best first.

    A way is a tuner, a quantization, an optimizer, a strategy and a number of devices; within it
    the micro-batch and the checkpointing are chosen here.
    """
    found = [best(within(space, way)) for way in ways(space)]
    return sorted(found, key=lambda each: (bool(each.why_not), *order(each)))


def ways(space: Space) -> Iterator[Configuration]:
    """Yield one configuration for each way to train; the batch is not in it yet."""
    request, able = space.request, space.capabilities
    for tuner, quantization in _methods(space):
        for count in _counts(space):
            world = count * request.nnodes
            for strategy, offload in _strategies(space, tuner, quantization, world):
                for optim in _optimizers(request, able, tuner, strategy):
                    whole = tuner == "full" and strategy in ("single", "ddp")
                    yield Configuration(
                        tuner=tuner,
                        quantization=quantization,
                        compute_dtype=space.dtype,
                        # Updates of full tuning are smaller than bfloat16 can add: the weights
                        # stay float32. ZeRO keeps a float32 copy of its own, in shares.
                        weights_dtype="float32" if whole else space.dtype,
                        lora_rank=request.lora_rank,
                        target_modules=request.target_modules,
                        use_dora=request.use_dora,
                        optim=optim,
                        attention=space.attention,
                        strategy=strategy,
                        world_size=world,
                        offload=offload,
                        row_gradients=request.dp_epsilon is not None,
                        chunked_loss=_chunks_loss(space, strategy),
                        async_save=request.async_save == "on" and not ZERO_STAGES[strategy],
                        block_attention=_in_blocks(space),
                        **objective_costs(space.data, request, tuner),
                    )


def _chunks_loss(space: Space, strategy: str) -> bool:
    """Return whether logits are made of a few labels at a time.

    DeepSpeed and Opacus want the whole model's forward pass, and images go through it. In float16
    the gradients of single labels would underflow, which only the loss's scale prevents.
    """
    whole = ZERO_STAGES[strategy] or space.request.dp_epsilon is not None or space.data.images
    able = not (whole or space.data.objective.scores or space.dtype == "float16")
    return able and space.request.chunked_cross_entropy != "off"


def _in_blocks(space: Space) -> bool:
    """Return whether attention is computed in blocks, instead of by torch's kernel for CPUs."""
    on_cpu = space.capabilities.torch_device == "cpu"
    return on_cpu and space.attention == "sdpa" and space.request.block_attention != "off"


def _methods(space: Space) -> list[tuple[str, str]]:
    request, offered = space.request, space.capabilities.quantization
    bits = {None: "nf4", 4: "nf4", 8: "int8"}[request.quant_bits]
    if request.tuner == "full":
        return [("full", "none")]
    if request.tuner == "qlora" or request.quant_bits is not None:
        return [("qlora", bits)]
    if request.tuner == "lora":
        return [("lora", "none")]
    found = [("lora", "none")]
    if bits in offered:
        found.append(("qlora", bits))
    if not (request.use_dora or request.use_rslora or space.data.images):
        found.append(("full", "none"))
    return found


def _counts(space: Space) -> list[int]:
    asked, here = space.request.nproc_per_node, len(space.devices)
    if asked is not None:
        return [asked]
    if "ddp" not in space.capabilities.strategies:
        return [1]
    return sorted({here, *(2**n for n in range(here.bit_length()) if 2**n <= here)})


def _strategies(
    space: Space, tuner: str, quantization: str, world: int
) -> Iterator[tuple[str, str]]:
    """Yield (strategy, offload) pairs that the devices and the request allow."""
    able = space.capabilities.strategies
    asked, _, suffix = space.zero.partition("_")
    if asked in ("auto", "off"):
        if world == 1:
            yield "single", "none"
        elif "ddp" in able:
            yield "ddp", "none"
    if asked == "off" or quantization != "none":
        return
    if space.data.objective.samples:
        return  # answers are sampled by a model that each device holds whole
    # A frozen copy is whole on each device, which DeepSpeed does not know of.
    if tuner == "full" and objective_costs(space.data, space.request, tuner)["frozen_copy"]:
        return
    on_host = space.capabilities.torch_device == "cpu"
    for stage in ("zero1", "zero2", "zero3"):
        if stage not in able or asked not in ("auto", stage):
            continue
        # Adapters' gradients and moments are too small to be worth sharing out.
        if asked == "auto" and (stage == "zero1" or (tuner != "full" and stage == "zero2")):
            continue
        if (world > 1 or asked == stage) and not suffix:
            yield stage, "none"
        if not on_host and (suffix or asked == "auto"):
            if stage == "zero3":
                yield stage, "parameters"
            elif tuner == "full":
                yield stage, "optimizer"


def _optimizers(
    request: TrainRequest, able: Capabilities, tuner: str, strategy: str
) -> Iterator[str]:
    if request.optim != "auto":
        yield request.optim
        return
    yield "adamw_torch"
    # An adapter's moments are small; and DeepSpeed shares out torch's AdamW.
    if tuner == "full" and strategy in ("single", "ddp"):
        for each in ("paged_adamw_8bit", "adamw_8bit"):
            if each in able.optimizers:
                yield each
                return


def within(space: Space, way: Configuration) -> list[Candidate]:
    """Return the candidates of one way: every micro-batch, without and with checkpointing.

    Where a micro-batch fits only with checkpointing, the fewest layers that will do are found too;
    where none fits, those that do with what recomputed layers keep on the host.
    """
    asked, offloads = space.request.gradient_checkpointing, space.request.activation_offloading
    batches = [
        replace(
            way,
            checkpointing=False,
            activation_offloading=offloads == "on",
            micro_batch=size,
            accumulation=accumulation,
        )
        for size, accumulation in _batches(space, way.world_size)
    ]
    if asked not in ("auto", "on", "off"):
        layers = None if int(asked) == space.model.layers else int(asked)
        return [_forecast(space, _recomputed(made, layers)) for made in batches]
    if offloads == "on":
        # Layers that aren't recomputed keep nothing on the host.
        return [_forecast(space, _recomputed(made)) for made in batches]
    without = [] if asked == "on" else [_forecast(space, made) for made in batches]
    with_all = [] if asked == "off" else [_forecast(space, _recomputed(made)) for made in batches]
    fewest = [
        _fewest(space, each.configuration) for each in without if asked == "auto" and each.why_not
    ]
    found = [*without, *(each for each in fewest if each is not None), *with_all]
    return [*found, *_offloaded(space, with_all)]


def _offloaded(space: Space, recomputed: Sequence[Candidate]) -> list[Candidate]:
    """Return what fits with activations on the host, where nothing does with them recomputed."""
    if offloading_obstacle(space.request, space.capabilities):
        return []
    if space.host_bytes is None or any(not each.why_not for each in recomputed):
        return []
    found: list[Candidate] = []
    for each in reversed(recomputed):  # the smallest micro-batch first
        made = _forecast(space, replace(each.configuration, activation_offloading=True))
        if made.why_not:
            break
        found.insert(0, made)
    return found


def _recomputed(made: Configuration, layers: int | None = None) -> Configuration:
    return replace(made, checkpointing=True, checkpointed_layers=layers)


def _fewest(space: Space, made: Configuration) -> Candidate | None:
    """Return the candidate that fits with the fewest recomputed layers; None where all have to be.

    A heap that is faster is worth more than a layer that isn't recomputed.
    """
    some, count = range(1, space.model.layers), made.world_size // space.request.nnodes
    for heap in _heaps(space):

        def fits(layers: int, heap: str = heap) -> bool:
            tried = replace(_recomputed(made, layers), heap=heap)
            return not lacks(space, memory_of(space, tried), count)

        # Each layer that is recomputed keeps less, so those that fit are the last of them.
        if some and fits(some[-1]):
            layers = some[bisect_left(some, True, key=fits)]
            return _forecast(space, _recomputed(made, layers), (heap,))
    return None


def _batches(space: Space, world: int) -> list[tuple[int, int]]:
    """Return (micro-batch, accumulation) pairs, largest first; the global batch stays the same."""
    request, items = space.request, epoch_items(space.data)
    # A step holds about as many rows in blocks as without.
    step_items = max(1, round(GLOBAL_BATCH_ROWS * items / train_rows(space.data)))
    if space.data.units:
        step_items = max(GLOBAL_BATCH_ROWS, min(PRIVATE_BATCH_UNITS, items // PRIVATE_STEPS))
    target = min(step_items, items)
    sizes = [request.per_device_train_batch_size]
    if sizes[0] is None:
        on_host = space.capabilities.torch_device == "cpu"
        tokens = MICRO_BATCH_TOKENS_CPU if on_host else MICRO_BATCH_TOKENS
        share = request.gradient_accumulation_steps or 1
        most = max(1, step_items // (world * share))
        by_tokens = max(1, min(most, round(tokens / mean_length(space.data))))
        largest = min(2 ** int(math.log2(by_tokens)), max(1, items // world))
        sizes = [max(1, largest >> n) for n in range(largest.bit_length())]
    return [
        (size, request.gradient_accumulation_steps or max(1, target // (size * world)))
        for size in sizes
        if size is not None
    ]


def memory_of(space: Space, made: Configuration) -> MemoryForecast:
    """Return the forecast of a configuration on the scarcest of the space's devices."""
    global_batch = made.micro_batch * made.accumulation * made.world_size
    step = space.shape(made.micro_batch, global_batch, _shares(space, made))
    available = scarcest(space).memory_free_bytes
    kind = space.capabilities.torch_device
    if kind == "cpu" and available is not None:
        # They share the machine's memory.
        available //= made.world_size // space.request.nnodes
    return forecast(
        space.model, made, step, available, kind == "cpu", attention_kernel(kind), device=kind
    )


def _shares(space: Space, made: Configuration) -> bool:
    # ZeRO-3's layers gather their weights, and were not asked.
    return space.shares and made.strategy != "zero3"


def _heaps(space: Space) -> tuple[str, ...]:
    # A roomy heap is never slower, and may be much faster, so it is taken wherever it fits.
    return ("roomy", "tight") if space.capabilities.torch_device == "cpu" else ("tight",)


def _forecast(space: Space, made: Configuration, heaps: tuple[str, ...] = ()) -> Candidate:
    global_batch = made.micro_batch * made.accumulation * made.world_size
    shares = _shares(space, made)
    count = made.world_size // space.request.nnodes
    for heap in heaps or _heaps(space):
        made = replace(made, heap=heap)
        memory = memory_of(space, made)
        why_not = lacks(space, memory, count)
        if not why_not:
            break
    items = min(epoch_items(space.data), global_batch) * rows_a_unit(space.data)
    mean = mean_length(space.data)
    labels = mean_label_tokens(space.data)
    computed = mean * (1 - space.spared(made.micro_batch, global_batch) if shares else 1)
    seen = mean / made.sequences
    if made.block_attention and space.data.packed_rows:
        # Queries meet keys of their own rows, of which `--packing` puts several in a block.
        seen *= len(space.data.lengths) / space.data.packed_rows
    time = space.timer(made, computed * items, labels * items, seen)
    if time is not None:
        steps = total_steps(space.request, epoch_items(space.data), global_batch)
        time = over_steps(time, steps)
    trained = space.model.parameters
    if made.tuner != "full":
        targets = lora_targets(space.model, made.target_modules)
        trained = lora_parameters(targets, made.lora_rank)
    recomputed = recomputed_layers(made, space.model.layers) / max(1, space.model.layers)
    return Candidate(made, count, memory, time, trained, recomputed, why_not)


def attention_kernel(torch_device: str) -> str:
    """Return what `scaled_dot_product_attention` runs on such devices, as `forecast` takes it."""
    return "fused" if torch_device in FUSED_ATTENTION else "math"
