"""From data files to rows: each file's shape is told by its columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mst.data.columns import Columns, find_columns, role_mapping
from mst.data.images import digest_of
from mst.data.records import Record, Records, kind_of, records
from mst.data.refusals import Place, Refusals, RowError
from mst.data.rows import DataSet, FileFacts, Row
from mst.data.selection import Selection, select
from mst.data.shapes.row import make_row
from mst.data.shapes.turns import USUAL, Tags
from mst.data.sources import OPTION, Source, find_source
from mst.data.text_files import json_line
from mst.errors import DataError
from mst.privacy.units import unit_value
from mst.seal.keys.ring import NO_KEYS, KeyRing


@dataclass(frozen=True)
class Reading:
    """How data is read; the options of `mst.request.TrainRequest` by the same names.

    Attributes:
        columns: COLUMN=ROLE each.
        on_bad_row: "error" or "skip".
        dataset_info: LLaMA-Factory's dataset_info.json, or its directory.
        seed: of samples.
        keys: open encrypted files.
        unit: column that says to whom a row belongs; None where nobody asks.
        option: that the user has named the data by.
    """

    columns: tuple[str, ...] = ()
    on_bad_row: str = "error"
    dataset_info: str | None = None
    seed: int = 42
    keys: KeyRing = field(default=NO_KEYS, repr=False)
    unit: str | None = None
    option: str = OPTION


_AS_USUAL = Reading()


@dataclass(frozen=True)
class RowReader:
    """What turns one file's records into rows; plain data, so that it can go to other processes.

    Attributes:
        file: resolved path.
        kind: as `mst.data.records.kind_of` says.
        columns: which of them are meant.
        tags: names within lists of turns.
        unit: column that says to whom a row belongs.
    """

    file: str
    kind: str
    columns: Columns
    tags: Tags = USUAL
    unit: str | None = None

    def row(self, number: int, fields: Mapping[str, Any]) -> Row:
        """Return a record's row.

        Raises:
            RowError: it has another shape, or nothing to learn from.
        """
        place = Place(self.file, number)
        row = make_row(place, self.columns, fields, self.tags)
        if self.unit is None:
            return row
        return replace(row, unit=unit_value(place, self.unit, fields))

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
        raise DataError(f"A data set is needed, but none was given. Pass {reading.option} FILE.")
    sources = [find_source(spec, reading.dataset_info, reading.option) for spec in specs]
    return _joined([_read_source(source, reading) for source in sources])


def check_columns_used(reading: Reading, columns: Iterable[Sequence[str]]) -> None:
    """Raise DataError when `--columns` names a column that no file has.

    Args:
        reading: the options.
        columns: each file's, as `FileFacts.columns` has them.
    """
    used = set(chain.from_iterable(columns))
    for role, column in role_mapping(reading.columns).items():
        if f"{role}={column}" not in used:
            raise DataError(
                f"--columns {column}={role}: no data file uses such a column. `mst data check` "
                "shows their columns; mend the name, or leave it out."
            )


def iter_rows(
    spec: str, reading: Reading = _AS_USUAL, refusals: Refusals | None = None
) -> Iterator[Row]:
    """Yield the rows that one argument names, holding a line or a batch of records at a time.

    A .json file is held whole while it is read, and a sample (`#~N`) until it is drawn.

    Args:
        spec: as `read` takes it.
        reading: the options.
        refusals: what happens to bad rows and counts them; as `reading` says without.

    Raises:
        DataError: as `read`, while rows are taken.
    """
    source = find_source(spec, reading.dataset_info, reading.option)
    kept = Refusals(reading.on_bad_row) if refusals is None else refusals

    def rows_of(path: Path) -> Iterator[Row]:
        with records(path, reading.keys) as opened:
            yield from file_rows(FileReading(path, source, reading, kept), opened)

    rows = chain.from_iterable(map(rows_of, source.files))
    yield from select(rows, source.selection, reading.seed)


def row_reader(path: Path, source: Source, reading: Reading = _AS_USUAL) -> RowReader:
    """Return the reader of one of a source's files, told by its first good record.

    Raises:
        DataError: it has none, or of no known shape.
    """
    file = FileReading(path, source, reading, Refusals("skip"))
    with records(path, reading.keys) as opened:
        reader, _ = _begin(file, opened)
    return reader


@dataclass
class FileReading:
    """One file that is being read; what is known of it grows with the rows that are taken.

    Attributes:
        path: resolved.
        source: that named it.
        reading: the options.
        refusals: what happens to its bad rows.
        reader: None before the first row is taken.
        names: of all fields that its rows have had so far.
    """

    path: Path
    source: Source
    reading: Reading
    refusals: Refusals
    reader: RowReader | None = None
    names: set[str] = field(default_factory=set)


def file_rows(file: FileReading, opened: Records) -> Iterator[Row]:
    """Yield a file's good rows.

    Args:
        file: what is read.
        opened: its records, none taken yet.

    Raises:
        DataError: as `read`.
    """
    file.reader, items = _begin(file, opened)
    for item in items:
        if isinstance(item, RowError):
            file.refusals.add(item)
            continue
        file.names.update(item.fields)
        try:
            row = file.reader.row(item.number, item.fields)
        except RowError as error:
            file.refusals.add(error)
            continue
        yield row


def used_columns(file: FileReading) -> tuple[str, ...]:
    """Return which columns were used so far, as `FileFacts.columns` has them."""
    if file.reader is None:
        return ()
    columns = file.reader.columns
    optional = (
        f"{role}={name}"
        for role, synonyms in columns.optional.items()
        for name in synonyms
        if name in file.names
    )
    return (*(f"{role}={column}" for role, column in columns.needed.items()), *optional)


def _begin(file: FileReading, opened: Records) -> tuple[RowReader, Iterator[Record | RowError]]:
    """Return a file's reader and its records from the first good one on."""
    for item in opened.items:
        if isinstance(item, RowError):
            file.refusals.add(item)
            continue
        registered = file.source.registered
        mapping = {**registered.mapping, **role_mapping(file.reading.columns)}
        kind = kind_of(file.path) or ""
        columns = find_columns(str(file.path), kind, item.fields, mapping)
        unit = file.reading.unit
        reader = RowReader(str(file.path), kind, columns, registered.tags, unit)
        return reader, chain((item,), opened.items)
    bad = sum(each.rows for each in file.refusals.listed())
    raise DataError(
        f"{file.path} was given as a data set, but it holds no rows"
        + (f" that can be used (refused: {bad})" if bad else " (it is empty)")
        + f". Add at least one row, or pass another {file.reading.option}."
    )


def _read_source(source: Source, reading: Reading) -> DataSet:
    selection, found = source.selection, list[DataSet]()
    left = None if selection.sampled else selection.rows
    for path in source.files:
        if left == 0:
            break
        found.append(_read_file(path, source, reading, left))
        left = None if left is None else left - len(found[-1].rows)
    if selection.sampled:
        found = _sampled(found, selection, reading.seed)
    return _joined(found)


def _sampled(found: Sequence[DataSet], selection: Selection, seed: int) -> list[DataSet]:
    """Return the files' rows that are drawn from all of them together."""
    numbered = ((index, row) for index, each in enumerate(found) for row in each.rows)
    drawn: list[list[Row]] = [[] for _ in found]
    for index, row in select(numbered, selection, seed):
        drawn[index].append(row)
    return [
        DataSet(tuple(rows), (_of_rows(each.files[0], rows),))
        for each, rows in zip(found, drawn, strict=True)
    ]


def _of_rows(facts: FileFacts, rows: Sequence[Row]) -> FileFacts:
    images, images_sha256 = digest_of(rows)
    return replace(facts, rows=len(rows), images=images, images_sha256=images_sha256)


def _joined(sets: Sequence[DataSet]) -> DataSet:
    return DataSet(
        tuple(chain.from_iterable(each.rows for each in sets)),
        tuple(chain.from_iterable(each.files for each in sets)),
    )


def _read_file(path: Path, source: Source, reading: Reading, limit: int | None) -> DataSet:
    file = FileReading(path, source, reading, Refusals(reading.on_bad_row))
    with records(path, reading.keys) as opened:
        rows = tuple(islice(file_rows(file, opened), limit))
        digest = opened.sha256()
    refused = file.refusals.listed()
    if not rows:
        raise DataError(
            f"{path}: none of its rows can be used, for example because: {refused[0]}. Mend them, "
            f"or pass another {reading.option}."
        )
    assert file.reader is not None
    facts = FileFacts(
        path=str(path),
        sha256=digest,
        kind=file.reader.kind,
        shape=file.reader.columns.shape,
        columns=used_columns(file),
        rows=len(rows),
        selection=str(source.selection),
        skipped=tuple(map(str, refused)),
        key=opened.key,
    )
    return DataSet(rows, (_of_rows(facts, rows),))
