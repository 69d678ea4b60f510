"""GPTQ's layout: codes packed down the inputs, zero points stored less one.

Symmetric and in the order of the inputs (desc_act false), which is what every engine loads.

Source: AutoGPTQ's `QuantLinear.pack`; gptqmodel 7.6.0 calls this layout checkpoint_format "gptq".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mst_plugins.layouts import words
from mst_plugins.layouts.rounding import Quantized
from mst_plugins.layouts.shapes import Expected, faults

if TYPE_CHECKING:
    import torch

BITS = (4, 8)
SYMMETRIC = (True,)


def pack(quantized: Quantized) -> dict[str, torch.Tensor]:
    """Return a layer's tensors.

    Args:
        quantized: symmetric.

    Returns:
        qweight: int32 (in * bits / 32, out).
        qzeros: int32 (groups, out * bits / 32), each zero point less one.
        scales: float16 (groups, out).
        g_idx: int32 (in,), the group of each input.
    """
    import torch

    bits = quantized.bits
    inputs = torch.arange(quantized.codes.shape[1], dtype=torch.int32)
    return {
        "qweight": words.pack(quantized.codes, bits).T.contiguous(),
        "qzeros": words.pack((quantized.zeros.T.int() - 1) % 2**bits, bits),
        "scales": quantized.scales.T.contiguous(),
        "g_idx": inputs // quantized.group_size,
    }


def unpack(tensors: Mapping[str, torch.Tensor], bits: int) -> Quantized:
    """Return what `pack` packed."""
    zeros = (words.unpack(tensors["qzeros"], bits).int() + 1) % 2**bits
    return Quantized(
        words.unpack(tensors["qweight"].T, bits),
        tensors["scales"].T.contiguous(),
        zeros.T.byte().contiguous(),
        bits,
        symmetric=True,
    )


def check(
    tensors: Mapping[str, torch.Tensor], out: int, width: int, bits: int, group_size: int
) -> list[str]:
    """Return what is wrong with the tensors of a layer (out, width), a line each."""
    groups = width // group_size
    expected = {
        "qweight": Expected((width * bits // 32, out), ("int32",)),
        "qzeros": Expected((groups, out * bits // 32), ("int32",)),
        "scales": Expected((groups, out), ("float16",)),
        "g_idx": Expected((width,), ("int32",)),
    }
    return faults(tensors, expected)


def config(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """Return config.json's quantization_config."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }
