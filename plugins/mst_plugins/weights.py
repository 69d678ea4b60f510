"""The weights of a model directory one by one, packed layers unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.model.facts import LinearShape
from mst.model.files import read_config, weight_files
from mst_plugins.layouts.layout import LAYOUTS
from mst_plugins.layouts.rounding import dequantize, round_to_nearest
from mst_plugins.quantized_model import Scheme
from mst_plugins.stored_layers import stored_layers

if TYPE_CHECKING:
    import torch


def stored_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and value of each tensor."""
    from safetensors import safe_open

    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def unpacked_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and value of each weight, those of quantized layers unpacked to float32.

    Args:
        directory: of a quantized model, which is believed to be what its config.json says.
    """
    config = read_config(directory)["quantization_config"]
    layout, bits = LAYOUTS[config["quant_method"]], _bits(config)
    for _, name, stored in stored_layers(directory):
        if isinstance(stored, dict):
            yield f"{name}.weight", dequantize(layout.unpack(stored, bits))
        else:
            yield name, stored


def _bits(config: dict[str, Any]) -> int:
    if "config_groups" in config:
        return int(config["config_groups"]["group_0"]["weights"]["num_bits"])
    return int(config["bits"])


def rounded_weights(
    source: Path, linears: tuple[LinearShape, ...], scheme: Scheme
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and value of each weight of a model, those of `linears` rounded to the scheme."""
    rounded = frozenset(f"{each.name}.weight" for each in linears)
    for name, weight in stored_weights(source):
        if name not in rounded:
            yield name, weight
            continue
        yield (
            name,
            dequantize(
                round_to_nearest(weight, scheme.bits, scheme.group_size, symmetric=scheme.symmetric)
            ),
        )
