"""The same codes in another layout: a method's own files to those that an engine reads."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mst.model.files import weight_files
from mst_plugins.layouts.layout import LAYOUTS
from mst_plugins.quantized_model import Scheme, write_side_files
from mst_plugins.stored_layers import stored_layers

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"


def repack(quantized: Path, source: Path, directory: Path, layout: str, scheme: Scheme) -> None:
    """Fill an empty directory with a quantized model's codes in another layout, shard by shard.

    Args:
        quantized: the model that is read.
        source: the model that it was quantized from: config, tokenizer and template.
        directory: the empty one.
        layout: of what is read: one of `LAYOUTS`.
        scheme: of what is written; bits and groups are those that are read.

    Raises:
        OSError: the disk is full, or the like.
    """
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    for shard, layers in itertools.groupby(stored_layers(quantized), key=lambda each: each[0]):
        tensors: dict[str, torch.Tensor] = {}
        for _, name, stored in layers:
            if isinstance(stored, dict):
                codes = LAYOUTS[layout].unpack(stored, scheme.bits)
                again = LAYOUTS[scheme.layout].pack(codes)
                tensors |= {f"{name}.{key}": value for key, value in again.items()}
            else:
                tensors[name] = stored
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    if (quantized / _INDEX).is_file():
        total = sum(each.stat().st_size for each in weight_files(directory))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    write_side_files(source, directory, scheme, {})
