"""A file's records, one at a time, whatever kind of file it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mst.data import tables, text_files
from mst.data.compressed import COMPRESSIONS, opened
from mst.data.refusals import RowError
from mst.durable import sha256
from mst.errors import DataError

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".txt": "txt", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
ACCEPTED_SUFFIXES = ".jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow"


@dataclass(frozen=True)
class Record:
    """One object, CSV record, line of text or table row; `number` counts as in `Row`."""

    number: int
    fields: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Records:
    """An open file.

    Attributes:
        items: its records, and in their place those that could not be read.
        sha256: reads what is left, and returns the hash of the bytes on disk.
    """

    items: Iterator[Record | RowError]
    sha256: Callable[[], str]


def kind_of(path: Path) -> str | None:
    """Return "jsonl", "json", "csv", "tsv", "txt", "parquet" or "arrow" by a file's name."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        inner = KINDS.get(Path(path.stem).suffix.lower())
        # Tables are compressed inside, and are read from their end.
        return None if inner in ("parquet", "arrow") else inner
    return KINDS.get(suffix)


@contextlib.contextmanager
def records(path: Path) -> Iterator[Records]:
    """Open a data file as records; no more than a line or a batch of them is held, but for .json.

    Args:
        path: resolved, and of a kind that `kind_of` knows.

    Raises:
        DataError: when it cannot be read or parsed; also while `items` are taken. The message
            names the place and never quotes the file.
    """
    kind = kind_of(path)
    if kind is None:
        raise DataError(
            f"{path} was given as a data set, but its suffix '{path.suffix}' is not one of "
            f"{ACCEPTED_SUFFIXES} (text also .gz or .zst). Convert it, or rename it to the suffix "
            "of what it holds."
        )
    if kind in ("parquet", "arrow"):
        found = tables.rows(path, kind)
        yield Records(_numbered(found), lambda: sha256(path))
        return
    with opened(path) as source:
        parse = text_files.PARSERS[kind]
        yield Records(_numbered(parse(str(path), source.stream)), source.sha256)


def _numbered(
    found: Iterator[tuple[int, Mapping[str, Any]] | RowError],
) -> Iterator[Record | RowError]:
    for each in found:
        yield each if isinstance(each, RowError) else Record(*each)
