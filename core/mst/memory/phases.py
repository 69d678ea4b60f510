"""The phases of a training step, and what is alive in each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mst.memory.activations import (
    Scheme,
    attention_backward_bytes,
    cast_bytes,
    early_bytes,
    late_bytes,
    mlp_backward_bytes,
    norm_backward_bytes,
    norm_bytes,
)
from mst.memory.layer import DecoderLayer
from mst.memory.shape import StepShape, logit_columns, mask_values, row_width


@dataclass(frozen=True)
class Phase:
    """What is alive beside weights, adapters and moments; bytes.

    Attributes:
        name: of the phase.
        gradients: of trained weights.
        activations: kept and in flight, autocast's copies of base weights with them.
        logits: the loss's tensors.
        casts: autocast's copies of the adapters.
        step_copy: of the optimizer's step.
        whole: every layer's kept tensors are there.
    """

    name: str
    gradients: int = 0
    activations: int = 0
    logits: int = 0
    casts: int = 0
    step_copy: int = 0
    whole: bool = True

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.gradients + self.activations + self.logits + self.casts + self.step_copy


@dataclass(frozen=True)
class Step:
    """What the phases are made from.

    Attributes:
        layer: an average decoder layer.
        layers: how many.
        shape: the micro-batch.
        scheme: numbers, and what is trained.
        recomputed: of the first layers, how many are recomputed in the backward pass.
        vocabulary: logits a position.
        head_width: input of the output head.
        tied: head and embedding share their weights.
        weights_bytes: of a held weight that is not quantized.
        gradients: of all trained weights, bytes.
        accumulates: gradients of an earlier micro-batch are there.
        step_copy: of the optimizer's step.
        quantized: base weights are packed and unpacked for each product.
        logit_rows: at most so many labels have logits at a time; 0 where all have.
        offloads: what the recomputed layers keep lies on the host, but for the last of them.
    """

    layer: DecoderLayer
    layers: int
    shape: StepShape
    scheme: Scheme
    recomputed: int
    vocabulary: int
    head_width: int
    tied: bool
    weights_bytes: int
    gradients: int
    accumulates: bool
    step_copy: int
    quantized: bool
    logit_rows: int = 0
    offloads: bool = False


@dataclass(frozen=True)
class _Alive:
    """What several phases count; bytes, but for `plain` and `inputs`.

    Attributes:
        plain: layers that are not recomputed.
        inputs: of recomputed layers, how many have their input on the device.
        before: gradients of an earlier micro-batch.
        stream: hidden states between two layers.
        whole: what one layer keeps.
        final: what the last norm and the head keep.
        shared: what all layers share.
        kept: all that is kept when the loss is computed.
        base_casts: autocast's copies of one layer's base weights.
        adapters: its copies of one layer's adapters.
        head_cast: its copy of the head.
        head_gradient: in float32.
    """

    plain: int
    inputs: int
    before: int
    stream: int
    whole: int
    final: int
    shared: int
    kept: int
    base_casts: int
    adapters: int
    head_cast: int
    head_gradient: int


def _alive(step: Step) -> _Alive:
    scheme, layer, tokens = step.scheme, step.layer, step.shape.tokens
    stream = tokens * layer.hidden * scheme.stream
    whole = early_bytes(layer, step.shape, scheme) + late_bytes(layer, step.shape, scheme)
    final, shared = _final_norm(step), _shared(step)
    # The first layers are the recomputed ones: what they would keep lives longest, and by the time
    # that they are computed again, what the others keep is gone.
    plain = step.layers - step.recomputed
    inputs = min(1, step.recomputed) if step.offloads else step.recomputed
    kept = inputs * stream + plain * whole + final + shared
    if not (scheme.full or step.recomputed):
        # Nothing before the first adapter needs a gradient, so the first norm keeps nothing.
        kept -= tokens * norm_bytes(layer.hidden, 1, scheme, layer.layer_norm, scheme.stream)
    if step.logit_rows:
        # The labels' states and their gradients, kept, and those of one chunk's logits.
        kept += 2 * step.shape.label_tokens * step.head_width * scheme.compute
    base_casts = cast_bytes(layer, scheme, step.weights_bytes) if not step.quantized else 0
    adapters = 0 if scheme.full else int(_adapter_casts(step))
    return _Alive(
        plain=plain,
        inputs=inputs,
        before=step.gradients if step.accumulates else 0,
        stream=stream,
        whole=whole,
        final=final,
        shared=shared,
        kept=kept,
        base_casts=max(0, base_casts - adapters),
        adapters=adapters,
        head_cast=_head_values(step) * scheme.compute if scheme.casts else 0,
        head_gradient=_head_values(step) * 4 if scheme.full else 0,
    )


def step_phases(step: Step) -> Iterator[Phase]:
    """Yield the phases of an optimizer step in which memory may peak."""
    alive = _alive(step)
    yield from _loss_phases(step, alive)
    yield from _head_phases(step, alive)
    yield from _decoder_phases(step, alive)
    yield from _first_layer_phases(step, alive)
    yield Phase("optimizer step", step.gradients, step_copy=step.step_copy, whole=False)


def _loss_phases(step: Step, alive: _Alive) -> Iterator[Phase]:
    scheme, plain = step.scheme, alive.plain
    logits, casts = _logits(step), step.layers * alive.adapters
    # Checkpointing drops what a layer keeps, but autocast's cache of trained weights lives on
    # until the forward pass is over.
    cached = alive.base_casts * (step.layers if scheme.full else max(1, plain))
    forward = alive.kept + cached + alive.head_cast
    backward = alive.kept + plain * alive.base_casts + alive.head_cast
    if step.logit_rows:
        yield Phase("loss", alive.before, forward, 12 * logits, casts)
        if not scheme.full:
            return
        # The head's gradient summed up in float32, and that of one chunk.
        backward += _head_values(step) * (4 + scheme.compute)
    else:
        copies = scheme.compute + (4 if scheme.compute != 4 else 0) + 4
        yield Phase("loss", alive.before, forward, logits * copies, casts)
    yield Phase("loss, backward", alive.before, backward, 12 * logits, plain * alive.adapters)


def _head_phases(step: Step, alive: _Alive) -> Iterator[Phase]:
    scheme, layer = step.scheme, step.layer
    gradients = alive.before + alive.head_gradient
    remain, casts = alive.plain * alive.base_casts, alive.plain * alive.adapters
    if scheme.full:
        yield Phase(
            "head, backward",
            gradients,
            alive.kept + remain + alive.head_cast + _head_values(step) * (scheme.compute % 4),
            _logits(step) * scheme.compute,
            casts,
        )
    norm = norm_backward_bytes(layer, step.shape.tokens, scheme)
    yield Phase("last norm, backward", gradients, alive.kept + remain + norm, 0, casts)


def _decoder_phases(step: Step, alive: _Alive) -> Iterator[Phase]:
    """Yield those of the last layer that is not recomputed, and of the last that is."""
    scheme, plain, stream = step.scheme, alive.plain, alive.stream
    gradients = alive.before + alive.head_gradient
    after = alive.kept - alive.final + plain * alive.base_casts
    if plain:
        yield from _layer_phases(step, gradients, after, plain * alive.adapters)
    if not step.recomputed:
        return
    # Of the layers above only the gradients are there.
    after -= plain * (alive.whole + alive.base_casts)
    above = 0 if step.accumulates or not scheme.full else 4 * plain * step.layer.weights
    # Where the stream is float32, the norm's input is what checkpointing has kept.
    after += alive.whole + alive.base_casts + (stream if scheme.stream < 4 else 0)
    # While a layer is computed again, what the one below it needs comes back from the host.
    after += (min(2, step.recomputed) - alive.inputs) * stream if step.offloads else 0
    yield from _layer_phases(step, gradients + above, after, alive.adapters, whole=plain == 0)


def _first_layer_phases(step: Step, alive: _Alive) -> Iterator[Phase]:
    """Yield those of the first layer and of the embedding, whose gradients are the last to come."""
    scheme, layer, shared = step.scheme, step.layer, alive.shared
    largest = 4 * layer.weights if not step.tied else step.vocabulary * step.head_width * 4
    extra = largest if scheme.full and (step.accumulates or step.tied) else 0
    in_flight = max(norm_backward_bytes(layer, step.shape.tokens, scheme), alive.stream)
    first = alive.whole
    if step.recomputed:
        first += alive.base_casts + alive.stream
    # The embedding's gradient is the last to come, unless the head has made a place for it.
    late = 0 if step.tied or step.accumulates or not scheme.full else _head_values(step) * 4
    yield Phase("embedding, backward", step.gradients + extra, shared + in_flight, whole=False)
    yield Phase(
        "first layer, backward",
        step.gradients - late - (4 * layer.weights if scheme.full else 0),
        shared + first + in_flight,
        0,
        alive.adapters,
        whole=False,
    )
    yield Phase(
        "first attention, backward",
        step.gradients - late - (4 * layer.attention_weights if scheme.full else 0),
        shared
        + early_bytes(layer, step.shape, scheme)
        + alive.base_casts
        + attention_backward_bytes(layer, step.shape, scheme),
        0,
        alive.adapters,
        whole=False,
    )


def _logits(step: Step) -> int:
    """Return the logits that are there at a time."""
    if step.logit_rows:
        return min(step.logit_rows, step.shape.label_tokens) * step.vocabulary
    return step.shape.rows * logit_columns(step.shape) * step.vocabulary


def offloaded_bytes(step: Step) -> int:
    """Return what one device keeps on the host: hidden states, in pinned memory.

    torch's allocator of pinned memory has blocks of a power of two
    (ATen/core/CachingHostAllocator.h).
    """
    if not step.offloads:
        return 0
    stream = step.shape.tokens * step.layer.hidden * step.scheme.stream
    return max(0, step.recomputed - 1) * (1 << max(0, stream - 1).bit_length())


def _layer_phases(
    step: Step, gradients: int, kept: int, casts: int, whole: bool = True
) -> Iterator[Phase]:
    """Yield the phases of a layer's backward pass, with `kept` of it and of those before it."""
    layer, scheme = step.layer, step.scheme
    unpacked = _unpacked(step)
    yield Phase(
        "feed-forward, backward",
        gradients,
        kept + mlp_backward_bytes(layer, step.shape.tokens, scheme) + unpacked,
        0,
        casts,
        whole,
    )
    yield Phase(
        "attention, backward",
        gradients,
        kept
        - late_bytes(layer, step.shape, scheme)
        + attention_backward_bytes(layer, step.shape, scheme)
        + unpacked,
        0,
        casts,
        whole,
    )


def _final_norm(step: Step) -> int:
    scheme, layer = step.scheme, step.layer
    tokens = step.shape.tokens
    kept = tokens * norm_bytes(layer.hidden, 1, scheme, layer.layer_norm, scheme.stream)
    if scheme.full:
        # the head's input at the chosen positions
        columns = step.shape.rows * logit_columns(step.shape)
        kept += columns * layer.hidden * scheme.compute
    return kept


def _adapter_casts(step: Step) -> float:
    if step.scheme.compute == 4:
        return 0
    return step.layer.adapted_width * step.scheme.rank * step.scheme.compute


def _head_values(step: Step) -> int:
    return step.vocabulary * step.head_width


def _shared(step: Step) -> int:
    """Return what all layers share: the mask, cosines and sines, token ids, positions, images."""
    width = row_width(step.shape)
    head = step.layer.queries // step.layer.heads
    angles = 0 if step.layer.layer_norm else 2 * width * head * step.scheme.stream
    kind = step.scheme.stream if step.scheme.attention == "eager" else 1
    mask = mask_values(step.shape) or (width * width if step.scheme.attention == "eager" else 0)
    return mask * kind + angles + step.shape.tokens * 24 + step.shape.image_bytes


def _unpacked(step: Step) -> int:
    """Return the one layer's weight that a product with quantized weights unpacks."""
    if not step.quantized:
        return 0
    return step.layer.hidden * max(step.layer.inner, step.layer.queries) * step.scheme.compute
