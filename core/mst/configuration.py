"""One way to train: every choice that the memory and the time of a step depend on."""

from __future__ import annotations

from dataclasses import dataclass

# ZeRO stage of each strategy; 0 for those that hold whole copies.
ZERO_STAGES = {"single": 0, "ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
# What `--deepspeed` takes beside a file's path.
ZERO_CHOICES = ("auto", "off", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


@dataclass(frozen=True)
class Configuration:
    """What is trained, in which numbers, and how it is cut over the devices.

    Attributes:
        tuner: "lora", "qlora" or "full".
        quantization: of the frozen linear layers: "none", "nf4" (double-quantized) or "int8".
        compute_dtype: dtype of the matrix products.
        weights_dtype: dtype in which the weights that are not quantized are held.
        lora_rank: r of LoRA.
        target_modules: layers that get an adapter, as in `TrainRequest`.
        use_dora: adapters are weight-decomposed.
        optim: "adamw_torch", "adamw_8bit" or "paged_adamw_8bit".
        attention: transformers' attention implementation.
        checkpointing: activations are recomputed in the backward pass.
        checkpointed_layers: of the decoder's first layers so many are; None for all.
        strategy: "single", "ddp", "zero1", "zero2" or "zero3".
        world_size: processes in all, one a device.
        offload: what ZeRO keeps in the host's memory: "none", "optimizer" or "parameters" (which
            includes the optimizer).
        micro_batch: rows a micro-batch on one device.
        accumulation: micro-batches an optimizer step.
        sequences: that the model reads of a row, on average: 2 of a preference.
        extra_passes: forward passes without gradients over each micro-batch, beside the training
            pass: those of a reference, say.
        frozen_copy: a second copy of the weights is held, as they were before training.
        scores: the model has a head for one score, and no logits.
        samples: tokens that are sampled one after the other before the gradients.
        row_gradients: a micro-batch leaves the gradients of each of its rows.
        chunked_loss: logits are made of a few labels at a time.
        heap: of a CPU's worker: "tight" gives freed memory back at once, "roomy" keeps it.
        compiled: the decoder's layers are.
        async_save: checkpoints are written beside the steps that follow, from a copy.
        activation_offloading: what recomputed layers keep lies in the host's memory.
        block_attention: is computed in blocks (see `mst.training.block_attention`).
    """

    tuner: str = "lora"
    quantization: str = "none"
    compute_dtype: str = "bfloat16"
    weights_dtype: str = "bfloat16"
    lora_rank: int = 8
    target_modules: tuple[str, ...] = ("all-linear",)
    use_dora: bool = False
    optim: str = "adamw_torch"
    attention: str = "sdpa"
    checkpointing: bool = False
    checkpointed_layers: int | None = None
    strategy: str = "single"
    world_size: int = 1
    offload: str = "none"
    micro_batch: int = 1
    accumulation: int = 1
    sequences: int = 1
    extra_passes: int = 0
    frozen_copy: bool = False
    scores: bool = False
    samples: int = 0
    row_gradients: bool = False
    chunked_loss: bool = False
    heap: str = "tight"
    compiled: bool = False
    async_save: bool = False
    activation_offloading: bool = False
    block_attention: bool = False


def recomputed_layers(made: Configuration, layers: int) -> int:
    """Return how many of a model's `layers` decoder layers compute their activations twice."""
    if not made.checkpointing:
        return 0
    return layers if made.checkpointed_layers is None else min(made.checkpointed_layers, layers)


def checkpointing_option(checkpointing: bool, layers: int | None) -> str:
    """Return what `--gradient-checkpointing` would have to say: "on", "off" or a number."""
    if not checkpointing:
        return "off"
    return "on" if layers is None else str(layers)


@dataclass(frozen=True)
class ObjectiveWork:
    """What an objective asks for beside a pass over each row, as memory and time depend on it.

    Attributes:
        reference: it compares with the model as it was before training.
        passes: forward passes a row that it makes before the gradients.
        scores: the model has a head for one score.
        samples: longest answer that it samples for each sequence.
    """

    reference: bool = False
    passes: int = 0
    scores: bool = False
    samples: int = 0
