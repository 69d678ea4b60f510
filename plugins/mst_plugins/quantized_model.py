"""A quantized model's directory: which layers hold codes, what lies beside them, what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.data.tokens import TOKENIZER_FILES
from mst.errors import ModelError
from mst.model.facts import LinearShape, read_facts
from mst.model.files import read_config, read_header, weight_files
from mst_plugins.layouts.layout import LAYOUTS

_SIDE_FILES = (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Scheme:
    """How weights become codes.

    Attributes:
        layout: how they lie in the files: one of `LAYOUTS`.
        bits: of a code; one of the layout's `BITS`.
        group_size: weights that share a scale; divides every layer's width.
        symmetric: zero is the middle code; one of the layout's `SYMMETRIC`.
    """

    layout: str
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


def write_side_files(
    source: Path, directory: Path, scheme: Scheme, changes: Mapping[str, Any]
) -> None:
    """Write config.json, the tokenizer and the template beside quantized weights.

    Args:
        source: the model's directory.
        directory: of the quantized weights.
        scheme: told in config.json.
        changes: what else differs in config.json.

    Raises:
        OSError: the disk is full, or the like.
    """
    quantization = LAYOUTS[scheme.layout].config(scheme.bits, scheme.group_size, scheme.symmetric)
    config = {**read_config(source), **changes, "quantization_config": quantization}
    (directory / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for name in _SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def faults(directory: Path, linears: Iterable[LinearShape], scheme: Scheme) -> list[str]:
    """Return what is wrong with a quantized model's layers, a line each; one layer in memory.

    Args:
        directory: of the quantized model.
        linears: its quantized layers.
        scheme: how they are quantized.
    """
    from safetensors import safe_open

    layout = LAYOUTS[scheme.layout]
    places = {name: path for path in weight_files(directory) for name in read_header(path)}
    found = []
    for each in linears:
        prefix = f"{each.name}."
        tensors = {}
        for name in [name for name in places if name.startswith(prefix)]:
            with safe_open(places[name], framework="pt") as file:
                tensors[name.removeprefix(prefix)] = file.get_tensor(name)
        # A bias stays as it was.
        tensors.pop("bias", None)
        shape = each.out_features, each.in_features
        found += [
            f"{each.name}: {fault}"
            for fault in layout.check(tensors, *shape, scheme.bits, scheme.group_size)
        ]
    return found
