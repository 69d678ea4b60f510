"""The one place where data files are opened: as they lie there, or decrypted in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.errors import DataError
from mst.seal.container.layout import SUFFIX
from mst.seal.container.reader import PlainBytes, SealedFile
from mst.seal.keys.ring import KeyRing


@dataclass(frozen=True)
class PlainFile:
    """An open data file.

    Attributes:
        raw: its bytes, not buffered; of an encrypted file, the plaintext.
        sha256: of an encrypted file as it lies on disk; None for a plain one.
        key: name of the key that opened it; "" for a plain one.
        sealed: the encrypted file itself.
    """

    raw: Any
    sha256: str | None = None
    key: str = ""
    sealed: SealedFile | None = None


def is_encrypted(path: Path) -> bool:
    """Return whether a file's name says that it is encrypted."""
    return path.suffix.lower() == SUFFIX


def plain_name(path: Path) -> Path:
    """Return the name of the original: `rows.jsonl` of `rows.jsonl.mst`."""
    return path.with_suffix("") if is_encrypted(path) else path


@contextlib.contextmanager
def opened_plain(path: Path, keys: KeyRing) -> Iterator[PlainFile]:
    """Open a data file; of an encrypted one every byte is authenticated before the first is read.

    Args:
        path: of an encrypted file, with its suffix.
        keys: open it.

    Raises:
        DataError: it can't be read, or its name says another kind than it has.
        EncryptionError: the key is missing or wrong, or the file is not as it was written.
    """
    if not is_encrypted(path):
        try:
            raw = path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(
                f"{path} could not be read: {error.strerror}. Check its permissions."
            ) from None
        with raw:
            yield PlainFile(raw)
        return
    with keys.open(path) as sealed:
        ending = sealed.front.header.ending
        if not plain_name(path).name.lower().endswith(ending):
            raise DataError(
                f"{path} holds a {ending} file, which its name doesn't say. Rename it to end in"
                f" {ending}{SUFFIX}."
            )
        # A bad segment at the end is found before a row at the beginning is trained on.
        digest = sealed.verify()
        yield PlainFile(PlainBytes(sealed), digest, keys.way_to(sealed), sealed)
