"""A model directory's tensors, those of a packed layer together, wherever they lie."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mst.model.files import weight_files

if TYPE_CHECKING:
    import torch

# The tensor that a layer has only where it is packed.
_PACKED = (".qweight", ".weight_packed")


def stored_layers(
    directory: Path,
) -> Iterator[tuple[str, str, torch.Tensor | dict[str, torch.Tensor]]]:
    """Yield each packed layer's tensors and each other tensor, shard by shard; one in memory.

    A layer's tensors may lie in several shards: who saves by size alone cuts anywhere. Its bias is
    not packed, so it comes by itself.

    Args:
        directory: of a model, quantized or not.

    Yields:
        The shard's file name, for a layer that in which its first tensor lies; then the layer's
        name and its tensors by their names in it, or a tensor's name and its value.
    """
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        files = {
            path.name: stack.enter_context(safe_open(path, framework="pt"))
            for path in weight_files(directory)
        }
        places = {name: shard for shard, file in files.items() for name in sorted(file.keys())}
        packed = {name.rpartition(".")[0] for name in places if name.endswith(_PACKED)}
        together: dict[str, list[str]] = {}
        for name in places:
            layer, _, tensor = name.rpartition(".")
            whole = layer if layer in packed and tensor != "bias" else name
            together.setdefault(whole, []).append(name)
        for whole, names in together.items():
            shard = places[names[0]]
            if whole in packed:
                prefix = f"{whole}."
                yield (
                    shard,
                    whole,
                    {
                        name.removeprefix(prefix): files[places[name]].get_tensor(name)
                        for name in names
                    },
                )
            else:
                yield shard, whole, files[shard].get_tensor(whole)
