"""Where the rows of a JSONL file begin, in 8 bytes a row, so that each can be read alone."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

from mst.data.compressed import COMPRESSIONS, opened
from mst.data.records import kind_of
from mst.data.refusals import Refusals, RowError
from mst.data.text_files import MAX_LINE_BYTES, lines
from mst.errors import DataError


@dataclass(frozen=True, eq=False)
class LineIndex:
    """The lines of a JSONL file that are not blank.

    Attributes:
        file: resolved path.
        starts: byte at which each begins.
        blanks: how many of them stood before each blank or refused line.
        sha256: of the file.
    """

    file: str
    starts: array[int] = field(repr=False)
    blanks: array[int] = field(repr=False)
    sha256: str


def index_lines(path: Path, refusals: Refusals) -> LineIndex:
    """Read a file once and return its index.

    Args:
        path: resolved.
        refusals: told of lines that are too long.

    Raises:
        DataError: the file is no JSONL, is packed, can't be read, or has no rows.
    """
    if kind_of(path) != "jsonl" or path.suffix.lower() in COMPRESSIONS:
        raise DataError(
            f"--streaming reads rows by their place in a file, which .jsonl alone allows; found"
            f" {path}. Convert or unpack it to .jsonl, or leave --streaming out."
        )
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
    if not starts:
        raise DataError(
            f"{path} was given as a data set, but it holds no rows. Add at least one row, or pass"
            " another --dataset."
        )
    return LineIndex(str(path), starts, blanks, digest)


def line_number(index: LineIndex, row: int) -> int:
    """Return the number of the line, from 1, on which a row stands."""
    return row + 1 + bisect_right(index.blanks, row)


def line_at(index: LineIndex, row: int) -> bytes:
    """Return a row's line.

    Raises:
        DataError: the file has gone.
    """
    try:
        with open(index.file, "rb") as stream:
            stream.seek(index.starts[row])
            return stream.readline(MAX_LINE_BYTES)
    except OSError as error:
        raise DataError(
            f"{index.file} is streamed, but it could not be read any more: {error.strerror}. Put it"
            " back as it was and resume the run."
        ) from None
