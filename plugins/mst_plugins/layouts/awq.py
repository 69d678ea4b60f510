"""AWQ's GEMM layout: 4-bit codes packed across the outputs, eight at a time in an order of its own.

Source: AutoAWQ's `WQLinear_GEMM.from_linear`; config version "gemm".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mst_plugins.layouts import words
from mst_plugins.layouts.rounding import Quantized
from mst_plugins.layouts.shapes import Expected, faults

if TYPE_CHECKING:
    import torch

BITS = (4,)
SYMMETRIC = (False, True)
# Lets CUDA kernels unpack a word into four pairs of neighbours.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(quantized: Quantized) -> dict[str, torch.Tensor]:
    """Return a layer's tensors.

    Returns:
        qweight: int32 (in, out / 8).
        qzeros: int32 (groups, out / 8).
        scales: float16 (groups, out).
    """
    return {
        "qweight": words.pack(quantized.codes.T, quantized.bits, _ORDER),
        "qzeros": words.pack(quantized.zeros.T, quantized.bits, _ORDER),
        "scales": quantized.scales.T.contiguous(),
    }


def unpack(tensors: Mapping[str, torch.Tensor], bits: int) -> Quantized:
    """Return what `pack` packed."""
    zeros = words.unpack(tensors["qzeros"], bits, _ORDER).T.contiguous()
    return Quantized(
        words.unpack(tensors["qweight"], bits, _ORDER).T.contiguous(),
        tensors["scales"].T.contiguous(),
        zeros,
        bits,
        symmetric=bool((zeros == 2 ** (bits - 1)).all()),
    )


def check(
    tensors: Mapping[str, torch.Tensor], out: int, width: int, bits: int, group_size: int
) -> list[str]:
    """Return what is wrong with the tensors of a layer (out, width), a line each."""
    groups = width // group_size
    expected = {
        "qweight": Expected((width, out * bits // 32), ("int32",)),
        "qzeros": Expected((groups, out * bits // 32), ("int32",)),
        "scales": Expected((groups, out), ("float16",)),
    }
    return faults(tensors, expected)


def config(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """Return config.json's quantization_config."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": bits,
        "group_size": group_size,
        "zero_point": not symmetric,
        "modules_to_not_convert": ["lm_head"],
    }
