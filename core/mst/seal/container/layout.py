"""The bytes of an encrypted file before its segments: `docs/format.md` describes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from mst.errors import EncryptionError

MAGIC = b"\x89MSTENC\n"
VERSION = 1
SUFFIX = ".mst"
TAG_BYTES = 16
MAC_BYTES = 32
SUITES = ("AES-256-GCM", "SM4-GCM")
# A row that is read alone costs its whole segment: 6 us with 32 KiB, 13 us with 64 KiB, and
# tokenizing it some 240 us. Rows of a shuffled epoch come from all over the file, so no segment
# that was kept would be met again. Whole files are read little faster with larger ones
# (benchmarks/encrypted_data.py).
SEGMENT_BYTES = 32 << 10
MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES = 4 << 10, 1 << 20
# A header is some hundred bytes and a wrapping at most a few kilobytes (a sealed credential): more
# is no header of ours, and is not read into memory.
MAX_BLOCK_BYTES = 1 << 16
MAX_PLAIN_BYTES = 1 << 46
_SEGMENT_COUNT_LIMIT = 1 << 32
_ENDING = re.compile(r"(\.[a-z0-9]{1,12}){1,3}", re.ASCII)


@dataclass(frozen=True)
class Header:
    """The part of a header that never changes; it is authenticated with every segment.

    Attributes:
        suite: one of `SUITES`.
        segment_bytes: plaintext of each segment but the last.
        salt: 32 random bytes of this file.
        prefix: the first 7 bytes of every nonce, random.
        ending: of the original's name, such as ".jsonl"; it says how rows are read.
        plain_bytes: size of the original.
    """

    suite: str
    segment_bytes: int
    salt: bytes
    prefix: bytes
    ending: str
    plain_bytes: int


@dataclass(frozen=True)
class Front:
    """All that stands before the segments.

    Attributes:
        header: parsed.
        fixed: its bytes as they stand in the file, from the magic on.
        wrappings: each way to the data key: a mapping with "kind".
        wrapping_bytes: as they stand in the file, with their length before them.
        mac: of `fixed` and `wrapping_bytes`.
        end: where the segments begin.
    """

    header: Header
    fixed: bytes
    wrappings: tuple[Mapping[str, Any], ...]
    wrapping_bytes: bytes
    mac: bytes
    end: int


def segments(plain_bytes: int, segment_bytes: int) -> int:
    """Return how many segments hold so many bytes; an empty file has one."""
    return max(1, -(-plain_bytes // segment_bytes))


def fixed_bytes(header: Header) -> bytes:
    """Return the header as it is written, from the magic on."""
    text = json.dumps(
        {
            "suite": header.suite,
            "segment": header.segment_bytes,
            "salt": header.salt.hex(),
            "prefix": header.prefix.hex(),
            "ending": header.ending,
            "bytes": header.plain_bytes,
        },
        separators=(",", ":"),
    ).encode("ascii")
    return MAGIC + VERSION.to_bytes(2, "big") + len(text).to_bytes(4, "big") + text


def wrapping_block(wrappings: tuple[Mapping[str, Any], ...]) -> bytes:
    """Return the ways to the data key as they are written, with their length.

    Raises:
        EncryptionError: they are more than a reader takes.
    """
    text = json.dumps(list(wrappings), separators=(",", ":")).encode("ascii")
    if len(text) > MAX_BLOCK_BYTES:
        raise EncryptionError(
            f"the ways to the key take {len(text)} bytes, and {MAX_BLOCK_BYTES} are allowed. Name"
            " fewer keys."
        )
    return len(text).to_bytes(4, "big") + text


def read_front(name: str, stream: BinaryIO) -> Front:
    """Parse what stands before the segments; nothing of it is authenticated yet.

    Args:
        name: of the file, for messages.
        stream: at its first byte.

    Raises:
        EncryptionError: it is no encrypted file, is cut off, or is newer than this version reads.
    """
    start = stream.read(len(MAGIC) + 2)
    if not start:
        raise EncryptionError(f"{name} is empty: no encrypted file has 0 bytes. Copy it again.")
    if not start.startswith(MAGIC):
        raise EncryptionError(
            f"{name} is no file of `mst data encrypt`: it begins with other bytes. Pass the"
            f" encrypted file, or give a plain one its own suffix instead of {SUFFIX}."
        )
    version = int.from_bytes(start[len(MAGIC) :], "big")
    if len(start) == len(MAGIC) + 2 and version != VERSION:
        raise EncryptionError(
            f"{name} has version {version} of the format, and this mst reads version {VERSION}."
            " Install the mst that wrote it, or a newer one."
        )
    text, size = _block(name, stream)
    header = _header(name, text)
    ways, ways_size = _block(name, stream)
    mac = stream.read(MAC_BYTES)
    if len(mac) != MAC_BYTES:
        raise _damaged(name)
    fixed = start + size + text
    return Front(
        header,
        fixed,
        _wrappings(name, ways),
        ways_size + ways,
        mac,
        len(fixed) + len(ways_size) + len(ways) + MAC_BYTES,
    )


def _damaged(name: str) -> EncryptionError:
    return EncryptionError(
        f"{name}: its header is cut off or damaged, so nothing of it is used. Copy it again from"
        " where it came."
    )


def _block(name: str, stream: BinaryIO) -> tuple[bytes, bytes]:
    size = stream.read(4)
    length = int.from_bytes(size, "big")
    if len(size) != 4 or length > MAX_BLOCK_BYTES:
        raise _damaged(name)
    text = stream.read(length)
    if len(text) != length:
        raise _damaged(name)
    return text, size


def _parsed(name: str, text: bytes) -> Any:
    try:
        return json.loads(text.decode("ascii"))
    except (ValueError, RecursionError):
        pass
    raise _damaged(name)


def _header(name: str, text: bytes) -> Header:
    found = _parsed(name, text)
    try:
        header = Header(
            suite=found["suite"],
            segment_bytes=found["segment"],
            salt=bytes.fromhex(found["salt"]),
            prefix=bytes.fromhex(found["prefix"]),
            ending=found["ending"],
            plain_bytes=found["bytes"],
        )
    except (KeyError, TypeError, ValueError):
        header = None
    if header is None or not _well_formed(header):
        raise _damaged(name)
    if header.suite not in SUITES:
        raise EncryptionError(
            f"{name} is encrypted with a suite that this mst doesn't know; it knows"
            f" {', '.join(SUITES)}. Install the mst that wrote it."
        )
    return header


def _well_formed(header: Header) -> bool:
    whole = (header.segment_bytes, header.plain_bytes)
    return (
        all(type(each) is int for each in whole)
        and isinstance(header.suite, str)
        and isinstance(header.ending, str)
        and len(header.salt) == 32
        and len(header.prefix) == 7
        and _ENDING.fullmatch(header.ending) is not None
        and MIN_SEGMENT_BYTES <= header.segment_bytes <= MAX_SEGMENT_BYTES
        and 0 <= header.plain_bytes <= MAX_PLAIN_BYTES
        and segments(header.plain_bytes, header.segment_bytes) <= _SEGMENT_COUNT_LIMIT
    )


def _wrappings(name: str, text: bytes) -> tuple[Mapping[str, Any], ...]:
    found = _parsed(name, text)
    if not (
        isinstance(found, list)
        and all(isinstance(each, dict) and isinstance(each.get("kind"), str) for each in found)
    ):
        raise _damaged(name)
    return tuple(found)
