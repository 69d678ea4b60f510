"""From data files to rows: each file's shape is told by its columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from mst.data.columns import Columns, find_columns, role_mapping
from mst.data.records import Record, Records, kind_of, records
from mst.data.refusals import Place, Refusals, RowError
from mst.data.rows import DataSet, FileFacts, Row
from mst.data.selection import Selection, select
from mst.data.shapes.row import make_row
from mst.data.shapes.turns import USUAL, Tags
from mst.data.sources import Source, find_source
from mst.data.text_files import json_line
from mst.errors import DataError


@dataclass(frozen=True)
class Reading:
    """How data is read; the options of `mst.request.TrainRequest` by the same names.

    Attributes:
        columns: COLUMN=ROLE each.
        on_bad_row: "error" or "skip".
        dataset_info: LLaMA-Factory's dataset_info.json, or its directory.
        seed: of samples.
    """

    columns: tuple[str, ...] = ()
    on_bad_row: str = "error"
    dataset_info: str | None = None
    seed: int = 42


_AS_USUAL = Reading()


@dataclass(frozen=True)
class RowReader:
    """What turns one file's records into rows; plain data, so that it can go to other processes.

    Attributes:
        file: resolved path.
        kind: as `mst.data.records.kind_of` says.
        columns: which of them are meant.
        tags: names within lists of turns.
    """

    file: str
    kind: str
    columns: Columns
    tags: Tags = USUAL

    def row(self, number: int, fields: Mapping[str, Any]) -> Row:
        """Return a record's row.

        Raises:
            RowError: it has another shape, or nothing to learn from.
        """
        return make_row(Place(self.file, number), self.columns, fields, self.tags)

    def parse_line(self, number: int, line: bytes) -> Row:
        """Return the row on one line of a JSONL file; no line before it is needed.

        Args:
            number: of the line, from 1.
            line: its bytes, without a byte order mark.

        Raises:
            RowError: it is no such row.
        """
        return self.row(number, json_line(self.file, number, line))


def read(specs: Sequence[str], reading: Reading = _AS_USUAL) -> DataSet:
    """Read data files into one data set, in the order given.

    Args:
        specs: files, directories, globs or registered names, also with `#N` or `#~N`.
        reading: the options.

    Raises:
        DataError: when a file or a row cannot be used; names file, row and field, and never
            quotes a row.
    """
    if not specs:
        raise DataError("A data set is needed, but none was given. Pass --dataset FILE.")
    sets = [_read_source(find_source(spec, reading.dataset_info), reading) for spec in specs]
    return DataSet(
        tuple(chain.from_iterable(each.rows for each in sets)),
        tuple(chain.from_iterable(each.files for each in sets)),
    )


def iter_rows(
    spec: str, reading: Reading = _AS_USUAL, refusals: Refusals | None = None
) -> Iterator[Row]:
    """Yield the rows of one --dataset argument, holding a line or a batch of records at a time.

    A .json file is held whole while it is read, and a sample (`#~N`) until it is drawn.

    Args:
        spec: as `read` takes it.
        reading: the options.
        refusals: what happens to bad rows and counts them; as `reading` says without.

    Raises:
        DataError: as `read`, while rows are taken.
    """
    source = find_source(spec, reading.dataset_info)
    kept = Refusals(reading.on_bad_row) if refusals is None else refusals
    rows = chain.from_iterable(_file_rows(path, source, reading, kept) for path in source.files)
    yield from select(rows, source.selection, reading.seed)


def row_reader(path: Path, source: Source, reading: Reading = _AS_USUAL) -> RowReader:
    """Return the reader of one of a source's files, told by its first good record.

    Raises:
        DataError: it has none, or of no known shape.
    """
    with records(path) as opened:
        reader, _ = _begin(opened, path, source, reading, Refusals("skip"))
    return reader


def _begin(
    opened: Records, path: Path, source: Source, reading: Reading, refusals: Refusals
) -> tuple[RowReader, Iterator[Record | RowError]]:
    """Return a file's reader and its records from the first good one on."""
    for item in opened.items:
        if isinstance(item, RowError):
            refusals.add(item)
            continue
        mapping = {**source.registered.mapping, **role_mapping(reading.columns)}
        kind = kind_of(path) or ""
        columns = find_columns(str(path), kind, item.fields, mapping)
        reader = RowReader(str(path), kind, columns, source.registered.tags)
        return reader, chain((item,), opened.items)
    bad = sum(each.rows for each in refusals.listed())
    raise DataError(
        f"{path} was given as a data set, but it holds no rows"
        + (f" that can be used (refused: {bad})" if bad else " (it is empty)")
        + ". Add at least one row, or pass another --dataset."
    )


def _file_rows(path: Path, source: Source, reading: Reading, refusals: Refusals) -> Iterator[Row]:
    with records(path) as opened:
        reader, items = _begin(opened, path, source, reading, refusals)
        yield from _good_rows(reader, items, refusals, set())


def _good_rows(
    reader: RowReader,
    items: Iterator[Record | RowError],
    refusals: Refusals,
    names: set[str],
) -> Iterator[Row]:
    """Yield a row for each good record, and keep the names of all fields in `names`."""
    for item in items:
        if isinstance(item, RowError):
            refusals.add(item)
            continue
        names.update(item.fields)
        try:
            row = reader.row(item.number, item.fields)
        except RowError as error:
            refusals.add(error)
            continue
        yield row


@dataclass
class _FileRead:
    rows: list[Row] = field(repr=False)
    facts: FileFacts


def _read_source(source: Source, reading: Reading) -> DataSet:
    selection, found = source.selection, []
    left = None if selection.sampled else selection.rows
    for path in source.files:
        if left == 0:
            break
        found.append(_read_file(path, source, reading, left))
        left = None if left is None else left - len(found[-1].rows)
    if selection.sampled:
        rows = chain.from_iterable(each.rows for each in found)
        kept = {id(row) for row in select(rows, selection, reading.seed)}
        for each in found:
            each.rows = [row for row in each.rows if id(row) in kept]
    return DataSet(
        tuple(chain.from_iterable(each.rows for each in found)),
        tuple(replace(each.facts, rows=len(each.rows), selection=str(selection)) for each in found),
    )


def _read_file(path: Path, source: Source, reading: Reading, limit: int | None) -> _FileRead:
    refusals, names = Refusals(reading.on_bad_row), set[str]()
    with records(path) as opened:
        reader, items = _begin(opened, path, source, reading, refusals)
        rows = list(select(_good_rows(reader, items, refusals, names), Selection(limit), 0))
        digest = opened.sha256()
    if not rows:
        refused = sum(each.rows for each in refusals.listed())
        raise DataError(
            f"{path}: none of its rows can be used (refused: {refused}; the first reason: "
            f"{refusals.listed()[0]}). Mend them, or pass another --dataset."
        )
    return _FileRead(
        rows,
        FileFacts(
            path=str(path),
            sha256=digest,
            kind=reader.kind,
            shape=reader.columns.shape,
            columns=_used(reader.columns, names),
            rows=len(rows),
            skipped=tuple(map(str, refusals.listed())),
        ),
    )


def _used(columns: Columns, names: set[str]) -> tuple[str, ...]:
    optional = (
        f"{role}={name}"
        for role, synonyms in columns.optional.items()
        for name in synonyms
        if name in names
    )
    return (*(f"{role}={column}" for role, column in columns.needed.items()), *optional)
