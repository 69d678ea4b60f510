"""Data files searched for personal data: how much of each kind, and in which rows."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mst.data.records import kind_of, records
from mst.data.refusals import Refusals, RowError
from mst.errors import DataError
from mst.seal.personal_data.patterns import KINDS
from mst.seal.personal_data.walk import count


@dataclass(frozen=True)
class KindCount:
    """Personal data of one kind in one file.

    Attributes:
        kind: of `mst.seal.personal_data.patterns.KINDS`.
        values: how many.
        rows: numbers of the rows that hold them, counted as in `mst data check`.
    """

    kind: str
    values: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class FileScan:
    """What was found in one file; none of its values.

    Attributes:
        path: resolved.
        sha256: of the file.
        rows: how many were searched.
        found: by kind, most first.
        unread: rows that could not be read, and so were not searched.
    """

    path: str
    sha256: str
    rows: int
    found: tuple[KindCount, ...]
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scan:
    """What was found in all files.

    Attributes:
        files: one by one.
        values: of each kind in all of them; a kind that was looked for and not found is 0.
        rows: that hold any.
    """

    files: tuple[FileScan, ...]
    values: dict[str, int]
    rows: int


def scan_files(paths: Sequence[Path], watch: Callable[[Path, int], None] | None = None) -> Scan:
    """Search files and return what was found.

    Args:
        paths: resolved; `mst.data.sources.find_source` gives them.
        watch: told of the file and its rows so far, now and then.

    Raises:
        DataError: a file can't be read at all.
    """
    files = tuple(scan_file(path, watch) for path in paths)
    values = dict.fromkeys(KINDS, 0)
    for file in files:
        for each in file.found:
            values[each.kind] += each.values
    rows = sum(len({row for each in file.found for row in each.rows}) for file in files)
    return Scan(files, values, rows)


def scan_file(path: Path, watch: Callable[[Path, int], None] | None = None) -> FileScan:
    """Search one file, holding one row at a time; see `scan_files`."""
    values: Counter[str] = Counter()
    rows: dict[str, array[int]] = {}
    refusals = Refusals("skip")
    searched = 0
    with records(path) as opened:
        # The names of a table's columns stand there once; they are searched with the first row.
        table = kind_of(path) in ("csv", "tsv", "parquet", "arrow")
        for item in opened.items:
            if isinstance(item, RowError):
                refusals.add(item)
                continue
            searched += 1
            found = count(item.fields, keys=searched == 1 or not table)
            for kind, many in found.items():
                values[kind] += many
                rows.setdefault(kind, array("Q")).append(item.number)
            if watch is not None and searched % 1000 == 0:
                watch(path, searched)
        digest = opened.sha256()
    if not searched and not refusals.listed():
        raise DataError(f"{path} holds no rows, so there is nothing to search. Check the path.")
    kinds = tuple(KindCount(kind, many, tuple(rows[kind])) for kind, many in values.most_common())
    return FileScan(str(path), digest, searched, kinds, tuple(map(str, refusals.listed())))
