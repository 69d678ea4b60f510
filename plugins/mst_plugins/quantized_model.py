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
from mst.model.processor import has_processor
from mst_plugins.layouts.layout import LAYOUTS
from mst_plugins.stored_layers import stored_layers

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
        ModelError: as `read_facts`; or weights that the layouts can't hold: experts, Conv1D,
            which GPT-2 stores transposed, and layers that the files name otherwise; or the model
            reads images.
    """
    facts = read_facts(model)
    if facts.experts:
        raise ModelError(
            f"{model} has {facts.experts} experts a layer, which are not quantized here: they hold"
            " most of its weights. Export it with --format merged."
        )
    if has_processor(model):
        raise ModelError(
            f"{model} reads images, and is not quantized here: what it says of an image is not"
            " compared. Export it with --format merged."
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
    copy_side_files(source, directory)


def copy_side_files(source: Path, directory: Path) -> None:
    """Copy what stays as it is beside other weights: tokenizer, template, generation config.

    Raises:
        OSError: the disk is full, or the like.
    """
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
    layout = LAYOUTS[scheme.layout]
    unseen = {each.name: each for each in linears}
    found = []
    for _, name, tensors in stored_layers(directory):
        if isinstance(tensors, dict) and name in unseen:
            each = unseen.pop(name)
            shape = each.out_features, each.in_features
            wrong = layout.check(tensors, *shape, scheme.bits, scheme.group_size)
            found += [f"{name}: {fault}" for fault in wrong]
    found += [f"{name}: it is not quantized" for name in unseen]
    return found
