"""Whether a layer's tensors have the shapes and dtypes that a layout gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Expected:
    """What one tensor must be: its shape, and the torch names of dtypes that will do."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def faults(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, Expected]) -> list[str]:
    """Return what is wrong with a layer's tensors, a line each; empty when nothing is.

    Args:
        tensors: by their name in the layer.
        expected: what the layout asks for.
    """
    found = [f"{name} is missing" for name in expected if name not in tensors]
    found += [f"{name} does not belong there" for name in tensors if name not in expected]
    for name, wanted in expected.items():
        if name not in tensors:
            continue
        shape = tuple(tensors[name].shape)
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        if shape != wanted.shape:
            found.append(f"{name} has the shape {shape}, not {wanted.shape}")
        if dtype not in wanted.dtypes:
            found.append(f"{name} is {dtype}, not {' or '.join(wanted.dtypes)}")
    return found
