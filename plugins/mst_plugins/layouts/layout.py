"""What every layout's module offers, and the layouts by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from mst_plugins.layouts import awq, gptq, pack_quantized
from mst_plugins.layouts.rounding import Quantized

if TYPE_CHECKING:
    import torch


class Layout(Protocol):
    """A module of this package that lays out a layer's weight."""

    @property
    def BITS(self) -> tuple[int, ...]:
        """Return the bits that a code can have."""
        ...

    @property
    def SYMMETRIC(self) -> tuple[bool, ...]:
        """Return whether weights can be symmetric and can be not, what is better first."""
        ...

    def pack(self, quantized: Quantized) -> dict[str, torch.Tensor]:
        """Return a layer's tensors, by their names in the layer."""
        ...

    def unpack(self, tensors: Mapping[str, torch.Tensor], bits: int) -> Quantized:
        """Return what `pack` packed."""
        ...

    def check(
        self,
        tensors: Mapping[str, torch.Tensor],
        out: int,
        width: int,
        bits: int,
        group_size: int,
    ) -> list[str]:
        """Return what is wrong with the tensors of a layer (out, width), a line each."""
        ...

    def config(self, bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
        """Return config.json's quantization_config."""
        ...


LAYOUTS: dict[str, Layout] = {"gptq": gptq, "awq": awq, "compressed-tensors": pack_quantized}
