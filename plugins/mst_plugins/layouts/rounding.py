"""Weights as whole numbers, a scale and a zero point a group: the numbers that layouts hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mst.errors import ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Quantized:
    """A linear layer's weight: scales * (codes - zeros), group by group along its inputs.

    Attributes:
        codes: uint8 (out, in), each below 2**bits.
        scales: float16 (out, groups); group i holds inputs from i * in / groups on.
        zeros: uint8 (out, groups), the code that stands for 0.
        bits: of a code.
        symmetric: every zero point is the middle code, 2**(bits - 1).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    symmetric: bool

    @property
    def group_size(self) -> int:
        """Return how many inputs share a scale."""
        return int(self.codes.shape[1] // self.scales.shape[1])


def round_to_nearest(
    weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool
) -> Quantized:
    """Return the codes nearest to a weight, with scales that just span each group.

    Scales are float16, as every layout has them. Where the weight is bfloat16 they fit into that
    too: engines that load the model in bfloat16 then multiply by the same numbers.

    Args:
        weight: floating point (out, in).
        bits: of a code.
        group_size: divides the inputs.
        symmetric: as in `Quantized`; else each group spans its own least and largest weight,
            and 0.

    Raises:
        ModelError: a weight is not finite, or too large for a scale in float16.

    Source: the range of GPTQ's `Quantizer.find_params` and of compressed-tensors 0.20's
    `calculate_qparams`, which agree.
    """
    import torch

    out, width = weight.shape
    groups = weight.float().reshape(out, width // group_size, group_size)
    if not groups.isfinite().all():
        raise ModelError(
            "the weight holds NaN or infinity, so it can't be quantized. Train again with a"
            " smaller learning rate, or in bfloat16."
        )
    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    levels = 2**bits - 1
    # The codes are made for the scales as they are stored.
    scales = _stored((high / levels - low / levels).to(weight.dtype))
    spacing = scales.float()
    zeros = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / spacing).round()
    zeros = zeros.clamp(0, levels)
    codes = ((groups / spacing[..., None]).round() + zeros[..., None]).clamp(0, levels)
    return Quantized(codes.reshape(out, width).byte(), scales, zeros.byte(), bits, symmetric)


def _stored(scales: torch.Tensor) -> torch.Tensor:
    """Return scales in float16; a group of zeros has the scale 1, to be divided by."""
    stored = scales.half()
    if not stored.isfinite().all():
        raise ModelError(
            f"a scale of {float(scales.max()):.3g} does not fit into float16 (65504 at most): the"
            " weights are far too large. Train again with a smaller learning rate."
        )
    return stored.masked_fill(stored == 0, 1)


def dequantize(quantized: Quantized) -> torch.Tensor:
    """Return the weight that codes, scales and zeros stand for, float32 (out, in)."""
    out, width = quantized.codes.shape
    groups = quantized.codes.float().reshape(out, -1, quantized.group_size)
    centred = groups - quantized.zeros.float()[..., None]
    return (centred * quantized.scales.float()[..., None]).reshape(out, width)
