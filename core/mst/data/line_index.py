"""Where the rows of a JSONL file begin, in 8 bytes a row, so that each can be read alone."""

from __future__ import annotations

import codecs
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from mst.data.compressed import COMPRESSIONS, opened
from mst.data.encrypted import is_encrypted, opened_plain, plain_name
from mst.data.records import kind_of
from mst.data.refusals import Refusals, RowError
from mst.data.text_files import MAX_LINE_BYTES, check_start, lines, too_long
from mst.errors import DataError
from mst.seal.container.reader import SealedFile
from mst.seal.container.row_index import BLANK
from mst.seal.keys.ring import NO_KEYS, KeyRing


@dataclass(frozen=True, eq=False)
class LineIndex:
    """The lines of a JSONL file that are not blank.

    Attributes:
        file: resolved path.
        starts: byte at which each begins.
        blanks: how many of them stood before each blank or refused line.
        sha256: of the file.
        key: name of the key that opened it; "" where it is not encrypted.
        sealed: the open file, where it is encrypted.
    """

    file: str
    starts: array[int] = field(repr=False)
    blanks: array[int] = field(repr=False)
    sha256: str
    key: str = ""
    sealed: SealedFile | None = field(default=None, repr=False)


def index_lines(path: Path, refusals: Refusals, keys: KeyRing = NO_KEYS) -> LineIndex:
    """Read a file once and return its index.

    Args:
        path: resolved.
        refusals: told of lines that are too long.
        keys: open it where it is encrypted.

    Raises:
        EncryptionError: it is encrypted, and can't be opened or is not as it was written.
        DataError: the file is no JSONL, is packed, can't be read, or has no rows.
    """
    if kind_of(path) != "jsonl" or plain_name(path).suffix.lower() in COMPRESSIONS:
        raise DataError(
            f"--streaming reads rows by their place in a file, which .jsonl alone allows; found"
            f" {path}. Convert or unpack it to .jsonl, or leave --streaming out."
        )
    if is_encrypted(path):
        return _of_encrypted(path, refusals, keys)
    starts, blanks = array("Q"), array("Q")
    with opened(path) as source:
        for _, line in lines(str(path), source.stream):
            if isinstance(line, RowError):
                refusals.add(line)
            elif line.strip():
                starts.append(source.stream.tell() - len(line))
                continue
            blanks.append(len(starts))
        digest = source.sha256()
    return _not_empty(LineIndex(str(path), starts, blanks, digest))


def _not_empty(index: LineIndex) -> LineIndex:
    if not index.starts:
        raise DataError(
            f"{index.file} was given as a data set, but it holds no rows. Add at least one row, or"
            " pass another --dataset."
        )
    return index


def _of_encrypted(path: Path, refusals: Refusals, keys: KeyRing) -> LineIndex:
    """Take the rows' places from the file's own index, which is authentic: no line is looked for.

    A byte order mark stays in the first line, whose start moves behind it.
    """
    starts, blanks = array("Q"), array("Q")
    with opened_plain(path, keys) as checked:
        digest, key = checked.sha256 or "", checked.key
    sealed = keys.open(path)
    first = sealed.line(0, MAX_LINE_BYTES)
    check_start(str(path), first)
    mark = len(codecs.BOM_UTF8) if first.startswith(codecs.BOM_UTF8) else 0
    for number, (start, end, blank) in enumerate(_places(sealed)):
        start += mark if number == 0 else 0
        blank = blank or (number == 0 and not first[mark:].strip())
        if end - start > MAX_LINE_BYTES:
            refusals.add(too_long(str(path), number + 1, MAX_LINE_BYTES))
        elif not blank:
            starts.append(start)
            continue
        blanks.append(len(starts))
    return _not_empty(LineIndex(str(path), starts, blanks, digest, key, sealed))


def _places(sealed: SealedFile) -> Iterator[tuple[int, int, bool]]:
    """Yield where each line begins and ends, and whether it is blank."""
    entries = sealed.rows()
    entries.append(sealed.front.header.plain_bytes)
    for entry, after in pairwise(entries):
        yield entry & ~BLANK, after & ~BLANK, bool(entry & BLANK)


def line_number(index: LineIndex, row: int) -> int:
    """Return the number of the line, from 1, on which a row stands."""
    return row + 1 + bisect_right(index.blanks, row)


def line_at(index: LineIndex, row: int) -> bytes:
    """Return a row's line.

    Raises:
        DataError: the file has gone.
        EncryptionError: it is encrypted, and no longer as it was written.
    """
    if index.sealed is not None:
        return index.sealed.line(index.starts[row], MAX_LINE_BYTES)
    try:
        with open(index.file, "rb") as stream:
            stream.seek(index.starts[row])
            return stream.readline(MAX_LINE_BYTES)
    except OSError as error:
        raise DataError(
            f"{index.file} is streamed, but it could not be read any more: {error.strerror}. Put it"
            " back as it was and resume the run."
        ) from None
