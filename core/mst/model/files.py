"""A model directory's files: config.json and the headers of its weights; no weight is read."""

from __future__ import annotations

import contextlib
import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mst.errors import ModelError
from mst.seal.container.layout import SUFFIX
from mst.seal.container.reader import PlainBytes
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.seal.supply.model_files import (
    check_model_files,
    only_pickle_message,
    read_bounded_json,
)

# The format's own limit (safetensors, `MAX_HEADER_SIZE`), so a corrupt length can't eat memory.
_MAX_HEADER_BYTES = 100_000_000
# Bits of an element, as safetensors 0.8 knows them; a dtype beyond these is told by its name only.
_DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16,
    "BF16": 16, "I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@contextlib.contextmanager
def _opened(path: Path, keys: KeyRing) -> Iterator[tuple[BinaryIO, int]]:
    """Open a weight file, as it is or encrypted, and yield it with its plain size in bytes."""
    if path.suffix != SUFFIX:
        with path.open("rb") as file:
            yield file, path.stat().st_size
        return
    sealed = keys.open(path)
    with io.BufferedReader(PlainBytes(sealed)) as plain:
        yield plain, sealed.front.header.plain_bytes


def read_header(path: Path, keys: KeyRing = NO_KEYS) -> dict[str, Any]:
    """Return a safetensors file's header: tensor name to dtype, shape and offsets.

    Args:
        path: the file.
        keys: open an encrypted one.

    Raises:
        ModelError: not a safetensors file, or its length is not what the header says.
        EncryptionError: an encrypted one doesn't open.

    Source: https://github.com/huggingface/safetensors#format
    """
    again = "Copy the file again and compare its checksum with the source's."
    with _opened(path, keys) as (file, size):
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{path} is not a whole safetensors file ({size} bytes). {again}")
        try:
            header: dict[str, Any] = json.loads(file.read(length), object_pairs_hook=_once)
            header.pop("__metadata__", None)
            end = _end_of_tiles(header)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise ModelError(f"{path}: the safetensors header is damaged. {again}") from None
    if size != 8 + length + end:
        raise ModelError(
            f"{path} is truncated or damaged: its header asks for {8 + length + end} bytes,"
            f" the file has {size}. {again}"
        )
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of two equal keys, readers differ on which counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _end_of_tiles(header: dict[str, Any]) -> int:
    """Return how many bytes the tensors take, one after the other, without gap or overlap.

    Raises:
        ValueError: they don't lie so, or a tensor's shape and dtype need other bytes than it has.
    """
    end = 0
    for begin, stop, kind, shape in sorted(
        (*each["data_offsets"], each["dtype"], each["shape"]) for each in header.values()
    ):
        sizes = (begin, stop, *shape)
        if not all(type(each) is int and each >= 0 for each in sizes):
            raise ValueError("a size is no whole number")
        bits = _DTYPE_BITS.get(kind)
        if begin != end or (bits is not None and 8 * (stop - begin) != math.prod(shape) * bits):
            raise ValueError("tensors overlap, or are not as large as they say")
        end = stop
    return end


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        ModelError: missing or malformed; or the directory holds what `check_model_files` refuses.
    """
    check_model_files(directory)
    path = directory / "config.json"
    if not path.is_file():
        found = ", ".join(sorted(each.name for each in directory.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{directory} is no model directory: it has no config.json (found: {found})."
            " Give the directory that holds config.json, tokenizer.json and *.safetensors."
        )
    config = read_bounded_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object. Copy it again from the source.")
    return config


def weight_files(directory: Path, encrypted: bool = False) -> tuple[Path, ...]:
    """Return the safetensors files of a model directory.

    Args:
        directory: of the model.
        encrypted: it is of an encrypted run: take the encrypted files and no others.

    Raises:
        ModelError: none, a missing shard, or only pickle files (which can run code when read).
    """
    suffix = SUFFIX if encrypted else ""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_bounded_json(index)["weight_map"].values()))
            if not all(each == Path(each).name and each.endswith(".safetensors") for each in names):
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(
                f"{index} is damaged, or names files that are no *.safetensors beside it."
                " Copy it again from the source."
            ) from None
        names = [each + suffix for each in names]
        missing = [each for each in names if not (directory / each).is_file()]
        if missing:
            raise ModelError(
                f"{directory} lacks {len(missing)} of {len(names)} weight files: {missing[0]} …"
                " Copy the missing files from the source."
            )
        return tuple(directory / each for each in names)
    whole = directory / f"model.safetensors{suffix}"
    if whole.is_file():
        return (whole,)
    found = tuple(sorted(directory.glob(f"model*.safetensors{suffix}")))
    if found:
        return found
    if not encrypted and list(directory.glob(f"model*.safetensors{SUFFIX}")):
        raise ModelError(
            f"{directory} is of an encrypted run, and only the run as a whole can be read. Name the"
            " run instead, or merge it, which writes a plain model: mst merge RUN --key-file FILE"
        )
    if pickled := only_pickle_message(directory):
        raise ModelError(pickled)
    raise ModelError(
        f"{directory} has a config.json but no weights (*.safetensors)."
        " Copy the model's weight files there too."
    )
