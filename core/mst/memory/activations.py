"""What a decoder layer keeps for its backward pass, and what is in flight on top of it.

Each term is what torch's autograd saves of the operators in transformers' decoder layers
(modeling_llama.py and those made from it), run as `mst.training.loss` runs them. Sizes in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from mst.memory.layer import DecoderLayer
from mst.memory.shape import StepShape, mask_values, row_width


@dataclass(frozen=True)
class Scheme:
    """In which numbers a step computes, and what it trains.

    Attributes:
        compute: bytes of a value in matrix products.
        stream: bytes of a value of the residual stream: the embedding's dtype.
        full: all weights are trained, else adapters.
        rank: of the adapters.
        attention: "fused", "blocks", "math" or "eager".
        on_host: the device is the CPU.
        dora: adapters are weight-decomposed.
    """

    compute: int
    stream: int
    full: bool
    rank: int
    attention: str
    on_host: bool
    dora: bool = False

    @property
    def casts(self) -> bool:
        """Whether autocast turns the stream's values into the products' dtype."""
        return self.compute != self.stream


def scores(layer: DecoderLayer, step: StepShape) -> int:
    """Return the values of one layer's attention matrices."""
    return step.rows * layer.heads * row_width(step) ** 2


def norm_bytes(width: int, heads: int, scheme: Scheme, layer_norm: bool, kind: int) -> int:
    """Return what a norm keeps of each token, its result left out.

    RMSNorm computes in float32: it keeps its input there and the reciprocal root mean square, and
    where its weight is trained the normalized values too. LayerNorm keeps its input, which on
    accelerators autocast has turned into float32.

    Args:
        width: values that are normalized.
        heads: rows of them a token.
        scheme: of the step.
        layer_norm: LayerNorm, else RMSNorm.
        kind: bytes of a value of the norm's input.
    """
    if layer_norm:
        as_float = not scheme.on_host and scheme.compute != 4
        return width * (4 if as_float else kind) + 8 * heads
    return width * 4 + 4 * heads + (width * kind if scheme.full else 0)


def _input_bytes(width: int, readers: int, adapted: bool, scheme: Scheme) -> int:
    """Return what `readers` linear layers keep of one input: one copy, or one each if cast."""
    if not (scheme.full or adapted):
        return 0
    return width * scheme.compute * (readers if scheme.casts else 1)


def attention_bytes(layer: DecoderLayer, step: StepShape, scheme: Scheme) -> int:
    """Return what attention keeps, from queries, keys and values to its output."""
    tokens, c = step.tokens, scheme.compute
    mask, matrix = mask_values(step), scores(layer, step)
    if scheme.attention == "blocks":
        # Queries, keys and values as they were given, and the output; the layers share a mask.
        return tokens * (2 * layer.queries + 2 * layer.keys) * c
    # transformers repeats keys and values for each query head when there is a mask.
    keys = layer.queries if mask or scheme.attention == "eager" else layer.keys
    heads = tokens * (layer.queries + 2 * keys) * c
    output = tokens * layer.queries * c
    if scheme.attention == "eager":
        # Probabilities in float32 from the softmax, and in the products' dtype for the values;
        # the older models ask for no float32, and get it where autocast does.
        narrow = layer.layer_norm and scheme.on_host and not scheme.casts
        return heads + output + matrix * (c if narrow or c == 4 else 4 + c)
    if scheme.attention == "math":
        # torch scales queries and keys by the root of the scale each, all in float32
        # (ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math).
        kept = tokens * 3 * layer.queries * 4 + output + matrix * 4
        # Values that need no copy are a view of the one product that made all three.
        return kept + (
            2 * tokens * layer.queries * 4 if layer.attention_inputs == 1 and c == 4 else 0
        )
    # Flash attention, Dao et al. 2022, section 3.1: the log-sum-exp, and no matrix. A mask is
    # turned from boolean into a layer's own copy in the products' dtype.
    return heads + output + tokens * layer.heads * 4 + mask * c


def _mlp_bytes(layer: DecoderLayer, tokens: int, scheme: Scheme) -> int:
    c, inner = scheme.compute, layer.inner
    product = c if scheme.full or "mlp_out" in layer.adapted else 0
    if layer.gated:
        # gate, silu(gate), up, and their product for the layer that follows
        kept = inner * (3 * c + product)
    elif layer.written_out_gelu:
        # 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))): x, 0.5 x, tanh, 1 + tanh.
        # Accelerators' autocast takes the power in float32, and so all that follows from it.
        late = c if scheme.on_host else 4
        power = 0 if late == c else 4
        kept = inner * (2 * c + 2 * late + power + product)
    else:
        kept = inner * (c + product)
    if layer.experts_per_token:
        # each expert's rows gathered, and its result before and after the router's weight
        kept += 3 * layer.experts_per_token * layer.hidden * c
    return tokens * kept


def adapter_bytes(layer: DecoderLayer, tokens: int, scheme: Scheme) -> int:
    """Return what adapters keep beside their inputs, casts of their weights left out.

    Each keeps the product with its first factor: Hu et al. 2021, "LoRA", section 4.1. DoRA keeps
    both products' sum and the scaled one (Liu et al. 2024, "DoRA", section 4.3), and makes the
    whole update of each weight.
    """
    if scheme.full:
        return 0
    kept = tokens * layer.adapters * scheme.rank * scheme.compute
    if scheme.dora:
        kept += tokens * layer.adapted_width * scheme.compute
        kept += 2 * layer.weights * 4
    return int(kept)


def layer_bytes(layer: DecoderLayer, step: StepShape, scheme: Scheme) -> int:
    """Return all that one layer keeps, casts of weights left out."""
    return early_bytes(layer, step, scheme) + late_bytes(layer, step, scheme)


def early_bytes(layer: DecoderLayer, step: StepShape, scheme: Scheme) -> int:
    """Return what the layer's first half keeps: norm and attention."""
    tokens, c = step.tokens, scheme.compute
    kept = norm_bytes(layer.hidden, 1, scheme, layer.layer_norm, scheme.stream)
    kept += _input_bytes(
        layer.hidden, layer.attention_inputs, "attention_in" in layer.adapted, scheme
    )
    if layer.qk_norm:
        both = layer.queries + layer.keys
        heads = layer.heads * both // layer.queries
        kept += norm_bytes(both, heads, scheme, layer.layer_norm, c)
    if layer.norms == 4:
        kept += norm_bytes(layer.hidden, 1, scheme, layer.layer_norm, c)
    return tokens * kept + attention_bytes(layer, step, scheme)


def late_bytes(layer: DecoderLayer, step: StepShape, scheme: Scheme) -> int:
    """Return what the layer's second half keeps: norm, feed-forward layer, adapters."""
    kept = norm_bytes(layer.hidden, 1, scheme, layer.layer_norm, scheme.stream)
    kept += _input_bytes(layer.hidden, layer.mlp_inputs, "mlp_in" in layer.adapted, scheme)
    if layer.norms == 4:
        kept += norm_bytes(layer.hidden, 1, scheme, layer.layer_norm, scheme.compute)
    tokens = step.tokens
    return tokens * kept + _mlp_bytes(layer, tokens, scheme) + adapter_bytes(layer, tokens, scheme)


def cast_bytes(layer: DecoderLayer, scheme: Scheme, weights_bytes: int) -> int:
    """Return the copies of a layer's weights that autocast makes and the backward pass needs.

    Args:
        layer: its widths.
        scheme: of the step.
        weights_bytes: of a held weight that is not quantized.
    """
    if scheme.compute == 4:
        return 0
    base = layer.weights * scheme.compute if weights_bytes != scheme.compute else 0
    return base + (0 if scheme.full else int(layer.adapted_width * scheme.rank * scheme.compute))


def norm_backward_bytes(layer: DecoderLayer, tokens: int, scheme: Scheme) -> int:
    """Return what is in flight in the backward pass of a norm over the residual stream.

    Five float32 values where the input was turned into float32, two beside what has been freed
    where the stream is float32; LayerNorm's kernel needs its input's and its output's gradient.
    """
    if layer.layer_norm:
        return tokens * layer.hidden * 2 * scheme.stream
    return tokens * layer.hidden * (20 if scheme.stream < 4 else 8)


def mlp_backward_bytes(layer: DecoderLayer, tokens: int, scheme: Scheme) -> int:
    """Return what is in flight in the backward pass of the feed-forward layer.

    A device without kernels of its own gets torch's silu_backward in four operators
    (ATen/native/Activation.cpp, math_silu_backward).
    """
    inner = layer.inner * (4 if layer.gated and scheme.attention == "math" else 2)
    return tokens * (inner + 2 * layer.hidden) * scheme.compute


def attention_backward_bytes(layer: DecoderLayer, step: StepShape, scheme: Scheme) -> int:
    """Return what is in flight when the gradients of the attention matrices are there."""
    tokens, c = step.tokens, scheme.compute
    stream = tokens * layer.hidden * scheme.stream
    if scheme.attention in ("fused", "blocks"):
        return stream + 3 * tokens * layer.queries * c
    # Gradients of the probabilities and of the scores; eager has let go of its cast copy by then.
    freed = c if scheme.attention == "eager" and c != 4 else 0
    return stream + scores(layer, step) * (8 - freed) + tokens * layer.queries * c
