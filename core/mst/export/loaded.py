"""A model directory's weights as transformers loads them, held against the model that was trained.

The names in the files may be older than those of the modules (LLaVA, Qwen2-VL, Mixtral), and
several tensors may become one, as the weights of all experts do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mst.model.files import read_config

if TYPE_CHECKING:
    import torch


def loaded_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and value of each weight, named as the modules are, in the dtype of config.json.

    Args:
        directory: of a model; one whose config.json names no dtype is loaded in float32.

    Raises:
        ModelError: transformers can't load it.
    """
    import torch

    from mst.training.adapters import load_model

    dtype = read_config(directory).get("dtype", "float32")
    model = load_model(directory, dtype, "sdpa", torch.device("cpu"))
    for name, each in model.named_parameters(remove_duplicate=False):
        yield name, each.detach()


def cast_faults(trained: torch.nn.Module, stored: torch.nn.Module, dtype: str) -> list[str]:
    """Return which weights are not, bit for bit, those that were trained, cast to a dtype.

    Args:
        trained: in float32.
        stored: of the same shape, with the weights of the files, in float32.
        dtype: torch name of the files'.
    """
    import torch

    kind = getattr(torch, dtype)
    pairs = zip(trained.named_parameters(), stored.parameters(), strict=True)
    return [
        f"{name} is not what was trained, cast to {dtype}"
        for (name, own), other in pairs
        if not torch.equal(other.detach(), own.detach().to(kind).float())
    ]


def lost_share(
    base: Iterable[tuple[str, torch.Tensor]], trained: torch.nn.Module, stored: torch.nn.Module
) -> float:
    """Return which share of the values that training has changed are the base's again, as stored.

    A base in bfloat16 lies on its grid, which is 0.4 to 0.8 % of a value wide: a change of less
    than half of that is no change after the cast.

    Args:
        base: name and value of its weights, as `loaded_weights` yields them.
        trained: merged in float32.
        stored: of the same shape, with the weights of the files.
    """
    own, cast = dict(trained.named_parameters()), dict(stored.named_parameters())
    changed = lost = 0
    for name, before in base:
        if name in own:
            moved = own[name].detach() != before.float()
            changed += int(moved.sum())
            lost += int((moved & (cast[name].detach() == before.float())).sum())
    return lost / changed if changed else 0.0
