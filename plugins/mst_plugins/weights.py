"""The weights of a model directory one by one, packed layers unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.model.facts import LinearShape
from mst.model.files import read_config, read_header, weight_files
from mst_plugins.layouts.layout import LAYOUTS
from mst_plugins.layouts.rounding import dequantize, round_to_nearest
from mst_plugins.quantized_model import Scheme

if TYPE_CHECKING:
    import torch

# The tensor that a layer has only where it is packed.
PACKED = (".qweight", ".weight_packed")


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
    from safetensors import safe_open

    places = {name: path for path in weight_files(directory) for name in read_header(path)}
    layers = {name.rpartition(".")[0] for name in places if name.endswith(PACKED)}
    packed: dict[str, dict[str, torch.Tensor]] = {}
    for name, path in sorted(places.items()):
        layer, _, tensor = name.rpartition(".")
        with safe_open(path, framework="pt") as file:
            value = file.get_tensor(name)
        if layer in layers and tensor != "bias":
            packed.setdefault(layer, {})[tensor] = value
        else:
            yield name, value
    config = read_config(directory)["quantization_config"]
    layout, bits = LAYOUTS[config["quant_method"]], _bits(config)
    for layer, tensors in packed.items():
        yield f"{layer}.weight", dequantize(layout.unpack(tensors, bits))


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
