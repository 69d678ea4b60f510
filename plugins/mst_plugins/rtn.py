"""Quantize a model by rounding each weight to the nearest code: no data, one shard at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import ModelError
from mst.model.facts import LinearShape
from mst.model.files import weight_files
from mst_plugins.layouts.layout import LAYOUTS
from mst_plugins.layouts.rounding import round_to_nearest
from mst_plugins.quantized_model import Scheme, write_side_files

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"


def round_model(
    source: Path, directory: Path, linears: Iterable[LinearShape], scheme: Scheme
) -> None:
    """Fill an empty directory with a rounded copy of a model: weights, config.json, tokenizer.

    Its shards are those of the source; one of them is in memory at a time.

    Args:
        source: model directory.
        directory: the empty one, such as `mst.training.sealed_directory.write_sealed` gives.
        linears: layers to round, from `decoder_linears`; all other weights stay as they are.
        scheme: how.

    Raises:
        ModelError: a weight is not finite, or too large for a float16 scale; names the layer.
        OSError: the disk is full, or the like.
    """
    from safetensors.torch import save_file

    rounded = frozenset(f"{each.name}.weight" for each in linears)
    weight_map: dict[str, str] = {}
    total = 0
    for shard in weight_files(source):
        tensors = _round_shard(shard, rounded, scheme)
        save_file(tensors, directory / shard.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
        total += sum(each.nbytes for each in tensors.values())
    if (source / _INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    write_side_files(source, directory, scheme, {})


def _round_shard(path: Path, rounded: frozenset[str], scheme: Scheme) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            weight = file.get_tensor(name)
            if name not in rounded:
                tensors[name] = weight
                continue
            layer = name.removesuffix(".weight")
            try:
                packed = _pack(weight, scheme)
            except ModelError as error:
                raise ModelError(f"{layer}: {error}") from None
            tensors |= {f"{layer}.{key}": value for key, value in packed.items()}
    return tensors


def _pack(weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    quantized = round_to_nearest(weight, scheme.bits, scheme.group_size, symmetric=scheme.symmetric)
    return LAYOUTS[scheme.layout].pack(quantized)
