"""From a plain file to an encrypted one, and to one whose key others can open."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from mst.errors import EncryptionError
from mst.seal.container.cipher import DATA, INDEX, Segments, front_mac
from mst.seal.container.layout import (
    SEGMENT_BYTES,
    Front,
    Header,
    fixed_bytes,
    segments,
    wrapping_block,
)
from mst.seal.container.row_index import RowIndex

_COPY_BYTES = 1 << 22


class Wrap(Protocol):
    """A way to the data key, which can be written into a header."""

    def wrap(self, data_key: bytes, salt: bytes) -> Mapping[str, Any]:
        """Return the way as it is written."""


@dataclass(frozen=True)
class Written:
    """What was encrypted.

    Attributes:
        plain_bytes: of the original.
        rows: entries of the index.
    """

    plain_bytes: int
    rows: int


def encrypt(
    source: BinaryIO,
    target: BinaryIO,
    ending: str,
    ways: tuple[Wrap, ...],
    suite: str = "AES-256-GCM",
    segment_bytes: int = SEGMENT_BYTES,
    size: int | None = None,
) -> Written:
    """Encrypt an open file, holding a segment of it and 8 bytes a row.

    Args:
        source: a file at its start; one without a descriptor needs `size`.
        target: takes the encrypted file.
        ending: of the original's name, as `Header.ending`.
        ways: to the key; at least one.
        suite: as `Header.suite`.
        segment_bytes: as `Header.segment_bytes`.
        size: of the original in bytes; None asks the file.

    Raises:
        EncryptionError: the source changes while it is read.
    """
    if size is None:
        size = os.fstat(source.fileno()).st_size
    salt = secrets.token_bytes(32)
    header = Header(suite, segment_bytes, salt, secrets.token_bytes(7), ending, size)
    data_key = secrets.token_bytes(32)
    return write(source, target, header, data_key, tuple(w.wrap(data_key, salt) for w in ways))


def write(
    source: BinaryIO,
    target: BinaryIO,
    header: Header,
    data_key: bytes,
    wrappings: tuple[Mapping[str, Any], ...],
) -> Written:
    """Write an encrypted file of given random values; `encrypt` draws them.

    A pair of `data_key` and `header.salt` must never be used for two files.

    Raises:
        EncryptionError: as `encrypt`.
    """
    fixed = fixed_bytes(header)
    target.write(_front(header, fixed, data_key, wrappings))
    cipher, index = Segments(data_key, header, fixed, DATA), RowIndex(header.ending)
    count = segments(header.plain_bytes, header.segment_bytes)
    left = header.plain_bytes
    for number in range(count):
        wanted = min(left, header.segment_bytes)
        plain = source.read(wanted)
        if len(plain) != wanted:
            raise _changed()
        left -= wanted
        index.add(plain)
        target.write(cipher.seal(number, number == count - 1, plain))
    if source.read(1):
        raise _changed()
    entries = index.finished()
    _write_index(target, entries, Segments(data_key, header, fixed, INDEX), header)
    return Written(header.plain_bytes, len(entries) // 8)


def _write_index(target: BinaryIO, entries: bytes, cipher: Segments, header: Header) -> None:
    size, count = header.segment_bytes, segments(len(entries), header.segment_bytes)
    view = memoryview(entries)
    for number in range(count):
        piece = view[number * size : (number + 1) * size]
        target.write(cipher.seal(number, number == count - 1, piece))


def _front(
    header: Header, fixed: bytes, data_key: bytes, wrappings: tuple[Mapping[str, Any], ...]
) -> bytes:
    block = wrapping_block(wrappings)
    return fixed + block + front_mac(data_key, header, fixed, block)


def rewrap(
    source: BinaryIO,
    target: BinaryIO,
    front: Front,
    data_key: bytes,
    wrappings: tuple[Mapping[str, Any], ...],
) -> None:
    """Copy an encrypted file with other ways to its key; its segments stay as they are.

    Args:
        source: the encrypted file.
        target: takes the copy.
        front: of `source`, authentic.
        data_key: of `source`.
        wrappings: all ways that the copy has.
    """
    target.write(_front(front.header, front.fixed, data_key, wrappings))
    source.seek(front.end)
    while block := source.read(_COPY_BYTES):
        target.write(block)


def _changed() -> EncryptionError:
    return EncryptionError(
        "the file changed its size while it was being encrypted, so nothing was written. Let"
        " whatever writes to it end, and encrypt it again."
    )
