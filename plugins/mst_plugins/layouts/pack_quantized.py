"""compressed-tensors' pack-quantized layout: signed codes packed along the inputs.

Symmetric: with zero points, transformers 5.23 and compressed-tensors 0.20 together refuse to load
their own layout, as the model that they build expects zero points that are not packed.

Source: compressed-tensors 0.20, `PackedQuantizationCompressor`; the same with 4 and 8 bits since
its first version.
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
        weight_packed: int32 (out, in * bits / 32), signed codes with 2**(bits - 1) added, so
            that they are our codes.
        weight_scale: float16 (out, groups).
        weight_shape: int64 (2,), out and in.
    """
    import torch

    return {
        "weight_packed": words.pack(quantized.codes, quantized.bits),
        "weight_scale": quantized.scales.contiguous(),
        "weight_shape": torch.tensor(quantized.codes.shape),
    }


def unpack(tensors: Mapping[str, torch.Tensor], bits: int) -> Quantized:
    """Return what `pack` packed."""
    import torch

    scales = tensors["weight_scale"]
    return Quantized(
        words.unpack(tensors["weight_packed"], bits),
        scales,
        torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8),
        bits,
        symmetric=True,
    )


def check(
    tensors: Mapping[str, torch.Tensor], out: int, width: int, bits: int, group_size: int
) -> list[str]:
    """Return what is wrong with the tensors of a layer (out, width), a line each."""
    expected = {
        "weight_packed": Expected((out, width * bits // 32), ("int32",)),
        "weight_scale": Expected((out, width // group_size), ("float16",)),
        "weight_shape": Expected((2,), ("int64",)),
    }
    found = faults(tensors, expected)
    if not found and tensors["weight_shape"].tolist() != [out, width]:
        found.append(f"weight_shape says {tensors['weight_shape'].tolist()}, not {[out, width]}")
    return found


def config(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """Return config.json's quantization_config."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        # TurboMind reads it here, not above (lmdeploy 0.18.0, turbomind/converter.py).
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
