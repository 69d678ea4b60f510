"""The bound found from second moments is the one that loses least over the inputs themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mst_plugins.awq_clipping import best_clips

if TYPE_CHECKING:
    import torch

_SIZE = 16


def _rounded(weights: torch.Tensor) -> torch.Tensor:
    """Return weights rounded to 3 bits between each group's least and largest."""
    low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / 7
    return ((weights - low) / scale).round() * scale + low


@pytest.mark.parametrize("seed", range(4))
def test_each_groups_bound_is_that_of_trying_all_on_the_inputs(seed: int) -> None:
    import torch

    torch.manual_seed(seed)
    inputs = torch.randn(40, 48) * torch.rand(48) * 5
    weight = torch.randn(12, 48) ** 3
    found = best_clips(weight, inputs.view(4, 10, 48), _SIZE, _rounded)
    own, read = weight.view(12, 3, _SIZE), inputs.view(40, 3, _SIZE)
    bounds = [own.abs().amax(-1, keepdim=True) * (1 - i / 20) for i in range(10)]
    lost = []
    for bound in bounds:
        change = _rounded(own.clamp(-bound, bound)) - own
        lost.append(torch.einsum("ogs,tgs->otg", change, read).pow(2).mean(1))
    best = torch.stack(bounds).gather(0, torch.stack(lost).argmin(0)[None, ..., None])[0]

    assert found.shape == (12, 3, 1)
    assert torch.allclose(found, best)
    assert (found < bounds[0]).any()
