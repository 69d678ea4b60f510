"""Quantize a model by rounding each weight to the nearest code: no data, one shard at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.data.tokens import TOKENIZER_FILES
from mst.errors import ModelError
from mst.model.facts import LinearShape, read_facts
from mst.model.files import read_config, read_header, weight_files
from mst_plugins.layouts.layout import Layout
from mst_plugins.layouts.rounding import round_to_nearest

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_SIDE_FILES = (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Scheme:
    """How weights become codes.

    Attributes:
        layout: how they lie in the files.
        bits: of a code; one of the layout's `BITS`.
        group_size: weights that share a scale; divides every layer's width.
        symmetric: zero is the middle code; one of the layout's `SYMMETRIC`.
    """

    layout: Layout
    bits: int
    group_size: int
    symmetric: bool


def decoder_linears(model: Path) -> tuple[LinearShape, ...]:
    """Return the layers of a model directory that are quantized: every linear one but the head.

    Raises:
        ModelError: as `read_facts`; or weights that the layouts can't hold: experts, and Conv1D,
            which GPT-2 stores transposed; or layers that the files name otherwise.
    """
    facts = read_facts(model)
    if facts.experts:
        raise ModelError(
            f"{model} has {facts.experts} experts a layer, which are not quantized here: they hold"
            " most of its weights. Export it with --format merged."
        )
    shapes = {
        name: tuple(tensor["shape"])
        for path in weight_files(model)
        for name, tensor in read_header(path).items()
    }
    for each in facts.linears:
        found = shapes.get(f"{each.name}.weight")
        if found != (each.out_features, each.in_features):
            held = "no such tensor" if found is None else f"a tensor of the shape {found}"
            raise ModelError(
                f"{model}: {each.name} should hold {each.out_features} x {each.in_features}"
                f" weights, but the files hold {held}, as where a model's layers are transposed"
                " (GPT-2) or several are stored as one. Export it with --format merged."
            )
    return facts.linears


def round_model(
    source: Path, directory: Path, linears: Iterable[LinearShape], scheme: Scheme
) -> None:
    """Fill an empty directory with a rounded copy of a model: weights, config.json, tokenizer.

    Its shards are those of the source; one of them is in memory at a time.

    Args:
        source: model directory.
        directory: the empty one; `mst.training.checkpoint.write_sealed` gives such.
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
    _write_config(source, directory, scheme)
    for name in _SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _round_shard(path: Path, rounded: frozenset[str], scheme: Scheme) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            weight = file.get_tensor(name)
            if name not in rounded:
                tensors[name] = weight
                continue
            layer = name.removesuffix("weight")
            try:
                packed = _pack(weight, scheme)
            except ModelError as error:
                raise ModelError(f"{layer[:-1]}: {error}") from None
            tensors |= {layer + key: value for key, value in packed.items()}
    return tensors


def _pack(weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    quantized = round_to_nearest(weight, scheme.bits, scheme.group_size, symmetric=scheme.symmetric)
    return scheme.layout.pack(quantized)


def _write_config(source: Path, directory: Path, scheme: Scheme) -> None:
    quantization = scheme.layout.config(scheme.bits, scheme.group_size, scheme.symmetric)
    config: dict[str, Any] = {**read_config(source), "quantization_config": quantization}
    (directory / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
