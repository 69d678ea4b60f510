"""GPTQ's pass over the columns of a layer, group by group, in few and contiguous products."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Scales that are tried, from a group's largest weight down to about half of it.
_SCALES, _LEAST_SCALE = 10, 0.5


def rounded_columns(
    weight: torch.Tensor, factor: torch.Tensor, group_size: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Round a layer's columns one after the other; what one loses, those after it make good.

    A group's scales are searched once all columns before it are rounded, and so on the weights that
    they are used for. gptqmodel 7.6.0 takes 128 columns at a time, searches the scales of all of
    them before the first is rounded, and makes a dozen strided passes for each.

    Args:
        weight: of a linear layer, (out, in), float32, columns in the order they are rounded in.
        factor: upper Cholesky factor of the inverse Hessian of the inputs, (in, in), float32.
        group_size: columns that share a scale; divides their number.
        bits: of a code; codes are symmetric, from -2^(bits - 1) on.

    Returns:
        The rounded weight, (out, in); its scales, (out, groups); and what is lost: half the sum of
        squares of each column's error over the factor's diagonal.

    Source: Frantar et al. 2022, "GPTQ", algorithm 1, with blocks of a group.
    """
    import torch

    left = weight.T.contiguous()
    rounded = torch.empty_like(left)
    highest = 2 ** (bits - 1) - 1
    scales, lost = [], 0.0
    for start in range(0, len(left), group_size):
        end = start + group_size
        block, own = left[start:end], factor[start:end, start:end]
        scale = best_scales(block, bits)
        errors = torch.empty_like(block)
        for place, diagonal in enumerate(own.diagonal().tolist()):
            code = torch.div(block[place], scale, out=rounded[start + place]).round_()
            code.clamp_(-highest - 1, highest).mul_(scale)
            torch.sub(block[place], code, out=errors[place]).div_(diagonal)
            block[place + 1 :].addr_(own[place, place + 1 :], errors[place], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        scales.append(scale)
        lost += float(errors.square().sum()) / 2
    return rounded.T.contiguous(), torch.stack(scales, dim=1), lost


def best_scales(block: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the scale of least squared error of each output's weights, (out,).

    Args:
        block: weights that share scales, (group size, out).
        bits: of a code; codes are symmetric.
    """
    import torch

    highest = 2 ** (bits - 1) - 1
    # As gptqmodel has it: the largest weight lies between the outermost code and the one inside it.
    largest = block.abs().amax(0) / (highest + 0.5)
    largest[largest == 0] = 1
    best: torch.Tensor = largest
    least = torch.full_like(largest, torch.inf)
    change = torch.empty_like(block)
    for step in range(_SCALES):
        scale = largest * (1 - (1 - _LEAST_SCALE) * step / _SCALES)
        torch.div(block, scale, out=change).round_().clamp_(-highest - 1, highest)
        lost = change.mul_(scale).sub_(block).square_().sum(0)
        best = torch.where(lost < least, scale, best)
        least = torch.minimum(lost, least)
    return best
