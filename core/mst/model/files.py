"""A model directory's files: config.json and the headers of its weights; no weight is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from mst.errors import ModelError

# The format's own limit (safetensors, `MAX_HEADER_SIZE`), so a corrupt length can't eat memory.
_MAX_HEADER_BYTES = 100_000_000


def read_header(path: Path) -> dict[str, Any]:
    """Return a safetensors file's header: tensor name to dtype, shape and offsets.

    Raises:
        ModelError: not a safetensors file, or its length is not what the header says.

    Source: https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    again = "Copy the file again and compare its checksum with the source's."
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{path} is not a whole safetensors file ({size} bytes). {again}")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((each["data_offsets"][1] for each in header.values()), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise ModelError(f"{path}: the safetensors header is damaged. {again}") from None
    if size != 8 + length + end:
        raise ModelError(
            f"{path} is truncated or damaged: its header asks for {8 + length + end} bytes,"
            f" the file has {size}. {again}"
        )
    return header


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        ModelError: missing or malformed.
    """
    path = directory / "config.json"
    if not path.is_file():
        found = ", ".join(sorted(each.name for each in directory.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{directory} is no model directory: it has no config.json (found: {found})."
            " Give the directory that holds config.json, tokenizer.json and *.safetensors."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise ModelError(f"{path} is not valid JSON. Copy it again from the source.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object. Copy it again from the source.")
    return config


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model directory.

    Raises:
        ModelError: none, a missing shard, or only pickle files (which can run code when read).
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError, UnicodeDecodeError):
            raise ModelError(f"{index} is damaged. Copy it again from the source.") from None
        missing = [each for each in names if not (directory / each).is_file()]
        if missing:
            raise ModelError(
                f"{directory} lacks {len(missing)} of {len(names)} weight files: {missing[0]} …"
                " Copy the missing files from the source."
            )
        return tuple(directory / each for each in names)
    if (directory / "model.safetensors").is_file():
        return (directory / "model.safetensors",)
    found = tuple(sorted(directory.glob("model*.safetensors")))
    if found:
        return found
    pickles = sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")])
    if pickles:
        raise ModelError(
            f"{directory} holds its weights as {pickles[0].name} only: a pickle, which can run code"
            " when it is read, so mst refuses it. If you trust where it came from, convert it:"
            ' python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;'
            f" M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors');"
            f" T.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\""
        )
    raise ModelError(
        f"{directory} has a config.json but no weights (*.safetensors)."
        " Copy the model's weight files there too."
    )
