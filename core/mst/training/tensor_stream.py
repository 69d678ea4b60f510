"""Tensors in safetensors' layout, read and written piece by piece.

The library lays them out in memory as a whole, or in a file. What is encrypted on its way would
stand in memory twice then, and a save would take more than was forecast.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch

# The format's names of dtypes, and torch's, in the order in which the library lays them out.
_DTYPES = {
    "I64": "int64", "F64": "float64", "F32": "float32", "I32": "int32", "BF16": "bfloat16",
    "F16": "float16", "I16": "int16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_FORMAT_NAMES = {f"torch.{name}": kind for kind, name in _DTYPES.items()}


def laid_out(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[BinaryIO, int]:
    """Return tensors as an open safetensors file, which can be read once, and its size in bytes.

    Args:
        tensors: contiguous; those of a device are brought to the host one by one.
        metadata: of the file.
    """
    found, size = pieces(tensors, metadata)
    return io.BufferedReader(_Pieces(found)), size


def pieces(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[Iterator[memoryview], int]:
    """Return the pieces of a safetensors file in their order, and its size; arguments as above."""
    # Wide elements first, so that each tensor begins at a multiple of its elements' size.
    places = {f"torch.{name}": place for place, name in enumerate(_DTYPES.values())}
    order = sorted(tensors, key=lambda name: (places[str(tensors[name].dtype)], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        each, begin = tensors[name], end
        end += each.numel() * each.element_size()
        header[name] = {
            "dtype": _FORMAT_NAMES[str(each.dtype)],
            "shape": list(each.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = memoryview(len(text).to_bytes(8, "little") + text)
    rest = (_bytes_of(tensors[name].cpu()) for name in order)
    return chain([start], rest), len(start) + end


def tensors_in(file: BinaryIO) -> dict[str, torch.Tensor]:
    """Return the tensors of an open safetensors file, which must be known to be whole.

    Args:
        file: at its first byte.
    """
    import torch

    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    tensors = {}
    for name, each in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        tensors[name] = torch.empty(each["shape"], dtype=getattr(torch, _DTYPES[each["dtype"]]))
        file.readinto(_bytes_of(tensors[name]))  # type: ignore[attr-defined]
    return tensors


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the host."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class _Pieces(io.RawIOBase):
    """Pieces of memory one after the other, as a file."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = piece
        size = min(len(self._left), len(buffer))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size
