"""A file's records, one at a time, whatever kind of file it is."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mst.data import tables, text_files
from mst.data.compressed import COMPRESSIONS, opened
from mst.data.encrypted import opened_plain, plain_name
from mst.data.refusals import RowError
from mst.durable import sha256
from mst.errors import DataError
from mst.seal.keys.ring import NO_KEYS, KeyRing

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
        key: name of the key that opened it; "" where it is not encrypted.
    """

    items: Iterator[Record | RowError]
    sha256: Callable[[], str]
    key: str = ""


def kind_of(path: Path) -> str | None:
    """Return "jsonl", "json", "csv", "tsv", "txt", "parquet" or "arrow" by a file's name."""
    path = plain_name(path)
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        inner = KINDS.get(Path(path.stem).suffix.lower())
        # Tables are compressed inside, and are read from their end.
        return None if inner in ("parquet", "arrow") else inner
    return KINDS.get(suffix)


@contextlib.contextmanager
def records(path: Path, keys: KeyRing = NO_KEYS) -> Iterator[Records]:
    """Open a data file as records; no more than a line or a batch of them is held, but for .json.

    Args:
        path: resolved, and of a kind that `kind_of` knows.
        keys: open it where it is encrypted.

    Raises:
        EncryptionError: it is encrypted, and can't be opened or is not as it was written.
        DataError: when it cannot be read or parsed; also while `items` are taken. The message
            names the place and never quotes the file.
    """
    kind = kind_of(path)
    if kind is None:
        raise DataError(
            f"{path} was given as a data set, but its suffix '{path.suffix}' is not one of "
            f"{ACCEPTED_SUFFIXES} (text also .gz or .zst, all also .mst). Convert it, or rename "
            "it to the suffix of what it holds."
        )
    if kind in ("parquet", "arrow"):
        with opened_plain(path, keys) as plain:
            # pyarrow takes a short read for the end of the file, and a raw one ends with a segment.
            whole = io.BufferedReader(plain.raw) if plain.sealed else None
            found = tables.rows(path, kind, whole)
            yield Records(_numbered(found), lambda: plain.sha256 or sha256(path), plain.key)
        return
    with opened(path, keys=keys) as source:
        parse = text_files.PARSERS[kind]
        yield Records(_numbered(parse(str(path), source.stream)), source.sha256, source.key)


def _numbered(
    found: Iterator[tuple[int, Mapping[str, Any]] | RowError],
) -> Iterator[Record | RowError]:
    for each in found:
        yield each if isinstance(each, RowError) else Record(*each)
