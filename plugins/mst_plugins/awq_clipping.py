"""How far AWQ clips each group of weights, found from second moments of what they are read with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# As AWQ's authors have them: bounds from a group's largest weight down to about half of it.
_BOUNDS, _LEAST_BOUND = 10, 0.5


def best_clips(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    group_size: int,
    rounded: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return the bound to clip each group of weights to, (out, groups, 1), so that least is lost.

    What is lost is the mean square of what a group adds to its output, over all inputs. For a
    change d of the weights that is d M d, with the inputs' second moments M of a group: found once,
    they take the place of the inputs.

    Args:
        weight: of a linear layer, (out, in).
        inputs: what it reads, (..., in).
        group_size: weights that share a scale.
        rounded: returns weights (out, groups, group size) as they are after quantization.

    Source: Lin et al. 2023, "AWQ", section 4.1, for the search.
    """
    import torch

    read = inputs.reshape(-1, weight.shape[1] // group_size, group_size).transpose(0, 1).float()
    moments = read.transpose(1, 2) @ read / read.shape[1]
    own = weight.reshape(len(weight), -1, group_size).float()
    largest = own.abs().amax(-1, keepdim=True)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for step in range(_BOUNDS):
        bound = largest * (1 - (1 - _LEAST_BOUND) * step / _BOUNDS)
        change = (rounded(own.clamp(-bound, bound)) - own).transpose(0, 1)
        lost = ((change @ moments) * change).sum(-1).T[..., None]
        best = torch.where(lost < least, bound, best)
        least = torch.minimum(lost, least)
    return best
