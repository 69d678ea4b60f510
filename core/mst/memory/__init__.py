"""The peak memory of a training step, from shapes alone: closed forms, each with its source."""

from __future__ import annotations

from dataclasses import replace

from mst.configuration import Configuration, recomputed_layers
from mst.memory.activations import Scheme
from mst.memory.layer import decoder_layer
from mst.memory.phases import Phase, Step, offloaded_bytes, step_phases
from mst.memory.runtime import (
    COMPILED_NF4_BYTES,
    LIBRARIES_BYTES,
    context_bytes,
    heap_bytes,
    segments_bytes,
)
from mst.memory.shape import StepShape, logit_columns, mask_values
from mst.memory.states import States, held
from mst.model.facts import ModelFacts, lora_targets
from mst.plan import MemoryForecast
from mst.quantities import FLOAT_BYTES
from mst.training.batches import chunk_rows

__all__ = [
    "LIBRARIES_BYTES", "StepShape", "forecast", "logit_columns", "mask_values",
]  # fmt: skip


def forecast(
    model: ModelFacts,
    configuration: Configuration,
    step: StepShape,
    available_bytes: int | None,
    on_host: bool = True,
    attention_kernel: str = "fused",
    device: str = "",
) -> MemoryForecast:
    """Predict the peak memory of training `model`; the parts are those alive at the peak.

    Args:
        model: its shape.
        configuration: how it is trained.
        step: the largest micro-batch.
        available_bytes: copied into the result.
        on_host: the device is the CPU, so that libraries, kernels' workspaces and what a save
            needs count too.
        attention_kernel: what `scaled_dot_product_attention` runs there: "fused", or "math" where
            torch has no kernel that spares the matrices.
        device: torch's name of the device type, for its context and its allocator; "" counts
            what tensors take and no more.
    """
    if configuration.attention.startswith("flash_attention"):
        # Those kernels take lengths instead of masks, and fewer key heads than query heads.
        step = replace(step, mask_values=0, masked=False)
    full = configuration.tuner == "full"
    targets = () if full else lora_targets(model, configuration.target_modules)
    layer = decoder_layer(model, targets)
    vocabulary = model.vocab_size * model.hidden_size
    widest = max((each.out_features * each.in_features for each in model.linears), default=0)
    rank = configuration.lora_rank
    largest = (
        max(vocabulary, widest)
        if full
        else max((rank * max(e.out_features, e.in_features) for e in targets), default=0)
    )
    states = held(model, targets, configuration, largest, layer.weights, on_host)
    made = Step(
        layer=layer,
        layers=max(1, model.layers),
        shape=step,
        scheme=_scheme(
            configuration, on_host, "blocks" if configuration.block_attention else attention_kernel
        ),
        recomputed=recomputed_layers(configuration, max(1, model.layers)),
        vocabulary=1 if configuration.scores else model.vocab_size,
        head_width=model.hidden_size,
        tied=model.tied_embeddings,
        weights_bytes=FLOAT_BYTES.get(configuration.weights_dtype, 4),
        gradients=states.gradients,
        accumulates=configuration.accumulation > 1,
        step_copy=states.step_copy,
        quantized=configuration.quantization != "none",
        logit_rows=chunk_rows(model.vocab_size) if configuration.chunked_loss else 0,
        offloads=configuration.activation_offloading and not on_host,
    )
    found = [
        *step_phases(made),
        Phase("save", step_copy=states.save, whole=False),
        *_sampling(model, configuration, step),
    ]
    peak = max(found, key=lambda each: each.bytes)
    heap = configuration.heap if on_host else ""
    states = replace(states, host=states.host + configuration.world_size * offloaded_bytes(made))
    return _parts(model, peak, states, made, available_bytes, heap, device, configuration.compiled)


def _sampling(
    model: ModelFacts, configuration: Configuration, step: StepShape
) -> tuple[Phase, ...]:
    """Return the phase in which answers are sampled: keys, values, and logits of one token each.

    A layer's cache is copied as it grows by a token. The step's tokens are those of answers that
    are as long as they may be.
    """
    if not configuration.samples:
        return ()
    width = FLOAT_BYTES.get(configuration.compute_dtype, 4)
    heads = model.key_value_heads * model.head_dim or model.hidden_size
    layers = max(1, model.layers) + 1
    answers = configuration.micro_batch * configuration.sequences
    return (
        Phase(
            "sampling",
            activations=layers * 2 * heads * width * step.tokens,
            # In the model's dtype, in float32, their probabilities, and these summed up.
            logits=answers * model.vocab_size * (width + 12),
            whole=False,
        ),
    )


def _scheme(configuration: Configuration, on_host: bool, kernel: str) -> Scheme:
    attention = configuration.attention
    if attention != "eager":
        attention = kernel if attention == "sdpa" else "fused"
    return Scheme(
        compute=FLOAT_BYTES.get(configuration.compute_dtype, 4),
        stream=FLOAT_BYTES.get(configuration.weights_dtype, 4),
        full=configuration.tuner == "full",
        rank=configuration.lora_rank,
        attention=attention,
        on_host=on_host,
        dora=configuration.use_dora,
    )


def _file_bytes(model: ModelFacts, made: Step) -> int:
    """Return what stays resident of the files that a CPU quantizes its weights from.

    They are mapped, and their pages stay; weights that are held as they are in the files are
    those pages.
    """
    return model.weight_bytes if made.quantized else 0


def _parts(
    model: ModelFacts,
    peak: Phase,
    states: States,
    made: Step,
    available_bytes: int | None,
    heap: str,
    device: str,
    compiled: bool,
) -> MemoryForecast:
    """Return the forecast whose parts are those of the peak phase."""
    # Written from the host's memory, which on a CPU is the device's.
    buffers, host = states.buffers, states.host + states.copied
    if heap:
        buffers, host = buffers + states.copied, states.host
    tensors = states.weights + states.adapters + states.optimizer + states.buffers + peak.bytes
    slack = segments_bytes(tensors, device)
    if heap:
        slack = heap_bytes(made, heap, peak.whole, compiled) + _file_bytes(model, made)
        slack += COMPILED_NF4_BYTES if compiled and made.quantized else 0
    return MemoryForecast(
        runtime_bytes=LIBRARIES_BYTES if heap else context_bytes(device),
        weights_bytes=states.weights,
        trainable_bytes=states.adapters + peak.casts,
        gradients_bytes=peak.gradients,
        optimizer_bytes=states.optimizer + peak.step_copy,
        activations_bytes=max(0, peak.activations),
        logits_bytes=peak.logits,
        available_bytes=available_bytes,
        buffers_bytes=buffers,
        slack_bytes=slack,
        host_bytes=host,
    )
