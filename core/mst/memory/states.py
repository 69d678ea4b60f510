"""What is held between steps: weights, adapters, optimizer states; and gradients and their buffers.

`trained` counts the weights that the optimizer changes. Sizes in bytes of one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mst.configuration import ZERO_STAGES, Configuration
from mst.model.facts import LinearShape, ModelFacts, lora_parameters
from mst.model.quantized import quantized_linears
from mst.quantities import FLOAT_BYTES

# Dettmers et al. 2023, "QLoRA", section 3: blocks of 64 values share an 8-bit constant, and 256
# constants a float32 one (functional.quantize_4bit of bitsandbytes 0.50.2).
NF4_BLOCK = 64
NF4_OUTER_BLOCK = 256
# Beside them a layer has tables of 16 and 256 float32 values and an offset, each in a block of an
# allocator: 512 + 1024 + 512.
NF4_TABLES_BYTES = 2048
# bitsandbytes 0.50.2, optim/optimizer.py: tensors below 4096 values keep 32-bit moments; the others
# have a float32 maximum for every 256 values of each moment.
SMALL_TENSOR = 4096
EIGHT_BIT_BLOCK = 256
# mst.training.parallel.BUCKET_BYTES.
BUCKET_BYTES = 25 * 2**20
# What mst.training.deepspeed_config asks for, in values: buckets, and half of one to prefetch.
ZERO_BUCKET = 100_000_000
ZERO_PREFETCH = 50_000_000
# Weights that stage 3 leaves whole once they have been fetched (stage3_max_live_parameters there).
ZERO_LIVE = 1_000_000_000
# Copies of fetched weights in flight: what was gathered, before each weight is cut out of it, and
# on a host gloo's own two.
ZERO_COPIES = {True: 3, False: 1}


@dataclass(frozen=True)
class States:
    """What one device holds.

    Attributes:
        weights: the base model.
        adapters: added weights.
        optimizer: moments, and a float32 copy of the trained weights where ZeRO makes one.
        gradients: of all trained weights, when all are there.
        step_copy: what the optimizer's step holds on top.
        buffers: of collectives, and layers gathered for a moment.
        host: of the host's memory, all ranks.
        save: what a save gathers beside the rest, less the buffers, which are free by then.
        copied: what a checkpoint that is written beside the steps takes, on the host.
    """

    weights: int
    adapters: int
    optimizer: int
    gradients: int
    step_copy: int
    buffers: int
    host: int
    save: int = 0
    copied: int = 0


def quantized_values(model: ModelFacts, configuration: Configuration) -> int:
    """Return the weights that bitsandbytes packs: linear layers other than the output head."""
    if configuration.quantization == "none":
        return 0
    found = sum(each.out_features * each.in_features for each in quantized_linears(model))
    return min(found, model.parameters)


def weights_bytes(model: ModelFacts, configuration: Configuration) -> int:
    """Return the base model's size on a device that holds all of it."""
    packed = quantized_values(model, configuration)
    width = FLOAT_BYTES.get(configuration.weights_dtype, 4)
    rest = (model.parameters - packed) * width
    if configuration.quantization == "nf4":
        maxima = packed // NF4_BLOCK
        tables = NF4_TABLES_BYTES * len(model.linears)
        return rest + packed // 2 + maxima + 4 * (maxima // NF4_OUTER_BLOCK) + tables
    if configuration.quantization == "int8":
        # Dettmers et al. 2022, "LLM.int8()", section 3: a byte a weight, a float32 scale a row.
        return rest + packed + 4 * sum(each.out_features for each in model.linears)
    return rest


def copy_bytes(model: ModelFacts, configuration: Configuration) -> int:
    """Return what a frozen copy of the model takes, as it was before training."""
    return weights_bytes(model, configuration) if configuration.frozen_copy else 0


def trained_weights(
    model: ModelFacts, targets: Sequence[LinearShape], configuration: Configuration
) -> int:
    """Return how many weights are trained; DoRA adds a magnitude for each output."""
    if configuration.tuner == "full":
        return model.parameters
    count = lora_parameters(targets, configuration.lora_rank)
    return count + (sum(each.out_features for each in targets) if configuration.use_dora else 0)


def moments_bytes(
    trained: int, targets: Sequence[LinearShape], configuration: Configuration
) -> int:
    """Return AdamW's two moments: 8 bytes a weight, or 2 and the maxima of blocks of them.

    Paged ones count too: they may spill to the host, but a step needs them on the device.
    """
    if configuration.optim == "adamw_torch":
        return 8 * trained
    small = sum(
        size
        for each in targets
        for size in (
            configuration.lora_rank * each.in_features,
            configuration.lora_rank * each.out_features,
        )
        if size < SMALL_TENSOR
    )
    large = trained - small
    return 8 * small + 2 * large + 8 * large // EIGHT_BIT_BLOCK


def held(
    model: ModelFacts,
    targets: Sequence[LinearShape],
    configuration: Configuration,
    largest: int,
    layer_weights: int,
    on_host: bool,
) -> States:
    """Return what a device holds.

    Args:
        model: its shape.
        targets: linear layers with adapters.
        configuration: how it is trained.
        largest: values of the largest tensor that is trained.
        layer_weights: values of one decoder layer.
        on_host: the device is the CPU.
    """
    trained = trained_weights(model, targets, configuration)
    gradients = 4 * trained
    if configuration.row_gradients:
        # Of each row in the dtype of the products, twice while Opacus takes them over, then in
        # float32 by unit; and the sums of clipped ones.
        width = FLOAT_BYTES.get(configuration.compute_dtype, 4)
        gradients += 4 * trained + configuration.micro_batch * trained * (width + 4)
    full = configuration.tuner == "full"
    base = weights_bytes(model, configuration)
    stage = ZERO_STAGES.get(configuration.strategy, 0)
    if stage:
        return _partitioned(model, configuration, stage, base, trained, layer_weights, on_host)
    # torch.optim.AdamW goes over lists of tensors on accelerators, with a copy of the second
    # moments' root (torch/optim/adamw.py, _multi_tensor_adam); on the CPU tensor by tensor, with
    # two copies of one. bitsandbytes' kernels make none on accelerators; on the CPU it computes a
    # tensor's update in float32: both moments, the gradient, and two more on the way to the
    # denominator (bitsandbytes 0.50.2, backends/cpu/ops.py).
    if configuration.optim == "adamw_torch":
        copy = 8 * largest if on_host else 4 * trained
    else:
        copy = 20 * largest if on_host else 0
    moments = moments_bytes(trained, targets, configuration)
    width = FLOAT_BYTES.get(configuration.weights_dtype, 4) if full else 4
    return States(
        weights=base + copy_bytes(model, configuration),
        adapters=0 if full else 4 * trained,
        optimizer=moments,
        gradients=gradients,
        step_copy=copy,
        buffers=min(4 * trained, max(BUCKET_BYTES, 4 * largest))
        if configuration.world_size > 1
        else 0,
        host=0,
        copied=width * trained + moments if configuration.async_save else 0,
    )


def _partitioned(
    model: ModelFacts,
    configuration: Configuration,
    stage: int,
    base: int,
    trained: int,
    layer_weights: int,
    on_host: bool,
) -> States:
    """Return what a rank holds under ZeRO.

    Source: Rajbhandari et al. 2020, "ZeRO", section 5 and figure 1; buffers as DeepSpeed 0.19.8
    makes them (runtime/zero/stage_1_and_2.py, stage3.py). In bfloat16 it holds the weights and the
    gradients in bfloat16; a float32 copy of the trained ones, which it shares out, there is always.
    """
    ranks = max(1, configuration.world_size)
    width = FLOAT_BYTES.get(configuration.compute_dtype, 4)
    full = configuration.tuner == "full"
    added = 0 if full else width * trained
    master = 4 * trained
    moments = 8 * trained
    gradients = width * trained
    # Allocated whole; on a host only what is written to becomes resident.
    buffers = (min(trained, ZERO_BUCKET) if on_host else ZERO_BUCKET) * width
    if stage >= 2:
        gradients //= ranks
    live = 0
    if stage == 3:
        base //= ranks
        added //= ranks
        kept = FLOAT_BYTES.get(configuration.weights_dtype, 4)
        live = min(model.parameters, layer_weights + ZERO_LIVE) * kept
        ahead = min(model.parameters, model.embedding_parameters + ZERO_PREFETCH) * kept
        buffers += live + ahead * ZERO_COPIES[on_host]
    shared = (master + moments) // ranks
    # Gradients of the rank's share turn into float32 for the step.
    step_copy = 0 if width == 4 else 4 * trained // ranks
    host = 0
    if configuration.offload != "none":
        # Master weights, moments and float32 gradients move to the host, pinned.
        host = master + moments + 4 * trained
        shared = step_copy = 0
    if configuration.offload == "parameters" and stage == 3:
        host += (base + added) * ranks
        base = added = 0
    # Rank 0 gathers trained weights and moments in the host's memory to save them.
    save = 4 * trained + moments + live - buffers if on_host else 0
    return States(base, added, shared, gradients, step_copy, buffers, host, save)
