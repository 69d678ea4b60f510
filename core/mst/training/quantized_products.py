"""A quantized weight's product on a CPU, summed up on top of an adapter's before both are rounded.

bitsandbytes' own products take nothing to begin their sums with. As in these the weight is unpacked
for each product, forward and back. Both are operators of torch, so that compiled layers don't see
the unpacked weight either, and keep none from the forward pass for the backward one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Adding = Callable[[Any, Tensor, Tensor], Tensor]


def adding_product(layer: Any) -> Adding | None:
    """Return a function that adds a layer's product to an update; None where the layer is another.

    The function takes (layer, update, input), computes in the update's dtype, and leaves the
    layer's bias out.

    Args:
        layer: what an adapter lies on: of bitsandbytes, on a CPU, NF4 with double quantization or
            int8.
    """
    loaded: Any = sys.modules.get("bitsandbytes")
    if loaded is None or not isinstance(layer, (loaded.nn.Linear4bit, loaded.nn.Linear8bitLt)):
        return None
    weight: Any = layer.weight
    if weight.device.type != "cpu":
        return None
    if isinstance(layer, loaded.nn.Linear8bitLt):
        return _add_int8
    state = weight.quant_state
    known = state is not None and state.nested and state.quant_type == "nf4"
    return _add_nf4 if known else None


def _add_nf4(layer: Any, update: Tensor, x: Tensor) -> Tensor:
    state = layer.weight.quant_state
    found: Tensor = add_nf4_product(
        update, x.to(update.dtype), layer.weight, state.blocksize, state.absmax,
        state.state2.blocksize, state.state2.absmax, state.state2.code, state.offset,
    )  # fmt: skip
    return found


def _add_int8(layer: Any, update: Tensor, x: Tensor) -> Tensor:
    weight = layer.weight
    # A layer's own first product moves them.
    scale = layer.state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
    found: Tensor = add_int8_product(update, x.to(update.dtype), weight, scale)
    return found


def added(update: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return update (..., out) + x (..., in) @ weight.T (out, in), summed up before rounding."""
    return torch.addmm(update.flatten(0, -2), x.flatten(0, -2), weight.t()).view(update.shape)


def _unpacked_nf4(
    packed: Tensor, blocksize: int, scales: Tensor, outer: int, maxima: Tensor, code: Tensor,
    offset: Tensor, shape: tuple[int, int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the weight that `bitsandbytes::gemm_4bit` multiplies by.

    Source: Dettmers et al. 2023, "QLoRA", section 3: blocks' scales are quantized about their mean.
    """
    operators = torch.ops.bitsandbytes
    absmax = operators.dequantize_blockwise(scales, maxima, code, outer, torch.float32) + offset
    flat = packed.view(-1, 1)
    found: Tensor = operators.dequantize_4bit(flat, absmax, blocksize, "nf4", shape, dtype)
    return found


@torch.library.custom_op("mst::add_nf4_product", mutates_args=())
def add_nf4_product(
    update: Tensor, x: Tensor, packed: Tensor, blocksize: int, scales: Tensor, outer: int,
    maxima: Tensor, code: Tensor, offset: Tensor,
) -> Tensor:  # fmt: skip
    """Return update + x @ weight.T, rounded once.

    Args:
        update: (..., out_features).
        x: (..., in_features), of the same dtype, in which the product is made.
        packed: the weight, two values a byte.
        blocksize: values that share a scale.
        scales: of all blocks, in 8 bits.
        outer: scales that share one of `maxima`.
        maxima: largest of each `outer` scales.
        code: (256,) what the scales' bytes stand for.
        offset: () mean of the scales.
    """
    weight = _unpacked_nf4(
        packed, blocksize, scales, outer, maxima, code, offset,
        (update.shape[-1], x.shape[-1]), x.dtype,
    )  # fmt: skip
    return added(update, x, weight)


@add_nf4_product.register_fake
def _(
    update: Tensor, x: Tensor, packed: Tensor, blocksize: int, scales: Tensor, outer: int,
    maxima: Tensor, code: Tensor, offset: Tensor,
) -> Tensor:  # fmt: skip
    return update.new_empty(update.shape)


def _keep_nf4(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, packed, ctx.blocksize, scales, ctx.outer, *others = inputs
    ctx.width = x.shape[-1]
    ctx.save_for_backward(packed, scales, *others)


def _gradients_nf4(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    of_x = None
    if ctx.needs_input_grad[1]:
        packed, scales, maxima, code, offset = ctx.saved_tensors
        weight = _unpacked_nf4(
            packed, ctx.blocksize, scales, ctx.outer, maxima, code, offset,
            (gradient.shape[-1], ctx.width), gradient.dtype,
        )  # fmt: skip
        of_x = gradient @ weight
    return (gradient, of_x, *[None] * 7)


add_nf4_product.register_autograd(_gradients_nf4, setup_context=_keep_nf4)


def _unpacked_int8(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight that bitsandbytes' `MatMul8bitFp` multiplies by."""
    return packed.to(dtype).mul_(scale[:, None] * (1 / 127))


@torch.library.custom_op("mst::add_int8_product", mutates_args=())
def add_int8_product(update: Tensor, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Return update + x @ weight.T, rounded once.

    Args:
        update: (..., out_features).
        x: (..., in_features), of the same dtype, in which the product is made.
        packed: (out_features, in_features) int8.
        scale: (out_features,) what 127 stands for.
    """
    return added(update, x, _unpacked_int8(packed, scale, x.dtype))


@add_int8_product.register_fake
def _(update: Tensor, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return update.new_empty(update.shape)


def _keep_int8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _gradients_int8(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    of_x = None
    if ctx.needs_input_grad[1]:
        packed, scale = ctx.saved_tensors
        of_x = gradient @ _unpacked_int8(packed, scale, gradient.dtype)
    return gradient, of_x, None, None


add_int8_product.register_autograd(_gradients_int8, setup_context=_keep_int8)
