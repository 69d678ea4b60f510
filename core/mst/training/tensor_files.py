"""Files of tensors (safetensors): as they are, or encrypted, and then plain in memory only.

What is encrypted has the suffix .mst after its name. A ring that holds the run's key says that a
file is to be encrypted; an empty one says that it is not.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.seal.container.layout import SUFFIX
from mst.seal.container.reader import PlainBytes
from mst.seal.container.writer import encrypt
from mst.seal.keys.ring import KeyRing
from mst.seal.keys.wrapping import KeyFileWay
from mst.training.tensor_stream import laid_out, pieces, tensors_in

if TYPE_CHECKING:
    import torch

# What takes the tensors of a file: tensors, path, keys, metadata; see `write`.
Write = Callable[["Mapping[str, torch.Tensor]", Path, KeyRing, "dict[str, str] | None"], None]
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ENDING = ".safetensors"


def file_name(name: str, keys: KeyRing) -> str:
    """Return the name under which a file of tensors lies on disk."""
    return name + SUFFIX if keys.key_files else name


def write(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    keys: KeyRing,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors; a segment of encrypted ones is held beside them.

    Args:
        tensors: contiguous, none sharing memory with another.
        path: named as `file_name` says.
        keys: of the run.
        metadata: of safetensors.
    """
    from safetensors.torch import save_file

    if not keys.key_files:
        save_file(dict(tensors), path, metadata)
        return
    plain, size = laid_out(tensors, metadata)
    with path.open("wb") as target:
        encrypt(plain, target, ENDING, tuple(map(KeyFileWay, keys.key_files)), size=size)


def write_beside(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    keys: KeyRing,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write what `write` would, byte by byte the same, while other threads compute.

    safetensors' own function never gives Python's lock away (0.8.0).

    Args:
        tensors: on the host, contiguous.
        path: named as `file_name` says.
        keys: of the run.
        metadata: of safetensors.
    """
    if keys.key_files:
        write(tensors, path, keys, metadata)
        return
    found, _ = pieces(tensors, metadata)
    with path.open("wb") as target:
        for each in found:
            target.write(each)


def read(path: Path, keys: KeyRing) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, on the host.

    Args:
        path: named as `file_name` says.
        keys: of the run; where there are some, a plain file is refused.

    Raises:
        EncryptionError: it is not what was encrypted with them.
    """
    from safetensors.torch import load_file

    if not keys.key_files:
        return load_file(path)
    with io.BufferedReader(PlainBytes(keys.open(path))) as plain:
        return tensors_in(plain)


def read_weights(directory: Path, keys: KeyRing) -> dict[str, torch.Tensor]:
    """Return the trained weights in a checkpoint, or in a run's result, by their names there."""
    ending = file_name(ENDING, keys)
    tensors: dict[str, torch.Tensor] = {}
    for each in (*directory.glob(f"adapter_model*{ending}"), *directory.glob(f"model*{ending}")):
        tensors |= read(each, keys)
    return tensors


@contextlib.contextmanager
def saving(keys: KeyRing, write_to: Write | None = None) -> Iterator[None]:
    """Let the `save_pretrained` of PEFT and transformers encrypt what they write; without keys not.

    Neither takes a function that writes: both call safetensors' by a name in their module. A
    version that has no such name fails here, before a byte is written.

    Args:
        keys: of the run.
        write_to: is given each file's tensors instead.
    """
    if not keys.key_files and write_to is None:
        yield
        return
    import peft.peft_model
    import transformers.modeling_utils

    modules: tuple[Any, ...] = (peft.peft_model, transformers.modeling_utils)
    before = [each.safe_save_file for each in modules]

    def save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        (write_to or write)(tensors, Path(file_name(str(filename), keys)), keys, metadata)

    try:
        for each in modules:
            each.safe_save_file = save_file
        yield
    finally:
        for each, own in zip(modules, before, strict=True):
            each.safe_save_file = own
