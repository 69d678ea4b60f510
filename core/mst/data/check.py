"""What is in data files, told without a word of theirs: for `mst data check`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from mst.data.encode import Example, encode
from mst.data.formats import FileReading, Reading, file_rows, used_columns
from mst.data.labels import AnswerTally, unknown_answer
from mst.data.records import records
from mst.data.refusals import Refusals, Refused, RowError
from mst.data.rows import Message, Row
from mst.data.scripts import script_shares
from mst.data.sources import find_source
from mst.data.template import ChatTemplate
from mst.data.tokens import TextTokenizer
from mst.errors import DataError

_BATCH_ROWS = 256
_NUMBERS_KEPT = 5


@dataclass(frozen=True)
class Encoder:
    """What turns rows into tokens."""

    tokenizer: TextTokenizer
    template: ChatTemplate
    train_on: str = "assistant"


@dataclass(frozen=True)
class FileCheck:
    """One file.

    Attributes:
        path: resolved.
        kind: as in `mst.data.rows.FileFacts`; "" when the file cannot be read.
        shape: likewise.
        columns: likewise.
        rows: that can be trained on.
        refused: those that cannot, by reason.
        problem: why the file cannot be read, or read to its end; None when it can.
        duplicates: rows that are the same as an earlier one, of any file.
        duplicate_rows: the first of their numbers.
        empty_turns: turns without text.
        empty_turn_rows: the first rows that have one.
    """

    path: str
    kind: str
    shape: str
    columns: tuple[str, ...]
    rows: int
    refused: tuple[Refused, ...]
    problem: str | None
    duplicates: int
    duplicate_rows: tuple[int, ...]
    empty_turns: int
    empty_turn_rows: tuple[int, ...]


@dataclass(frozen=True)
class Bin:
    """Rows of at least `tokens` tokens, and fewer than the next bin has."""

    tokens: int
    rows: int


@dataclass(frozen=True)
class Lengths:
    """Tokens a row.

    Attributes:
        total: of all rows.
        median: half of the rows have at most so many.
        p90: nine of ten.
        p99: 99 of 100.
        longest: all.
        histogram: in powers of two.
        max_length: the limit that was asked about.
        too_long: rows above it: `--truncation-strategy` says what becomes of them.
    """

    total: int
    median: int
    p90: int
    p99: int
    longest: int
    histogram: tuple[Bin, ...]
    max_length: int
    too_long: int


@dataclass(frozen=True)
class DataCheck:
    """What was found.

    Attributes:
        files: of --dataset.
        val_files: of --val-dataset.
        lengths: of all rows; None when no tokenizer was at hand or no row is left.
        scripts: each script's share of the letters.
        overlap: rows of --val-dataset that --dataset has too.
        answers: how many different ones --dataset has, when it is a classification.
    """

    files: tuple[FileCheck, ...]
    val_files: tuple[FileCheck, ...]
    lengths: Lengths | None
    scripts: Mapping[str, float]
    overlap: int
    answers: int | None


def has_problems(check: DataCheck) -> bool:
    """Return whether `mst train` would refuse something."""
    return any(each.problem or each.refused for each in (*check.files, *check.val_files))


def check_data(
    specs: Sequence[str],
    val_specs: Sequence[str],
    reading: Reading,
    encoder: Encoder | None,
    max_length: int,
) -> DataCheck:
    """Look at all rows, one batch at a time, and go on after bad ones.

    Args:
        specs: what --dataset would be.
        val_specs: what --val-dataset would be.
        reading: the options of reading.
        encoder: the model's; None to count no tokens.
        max_length: the limit that rows are compared with.

    Raises:
        DataError: a path that is not there.
    """
    tally = _Tally(encoder)
    seen: set[bytes] = set()
    val_seen: set[bytes] = set()
    files = tuple(_checked_files(specs, reading, tally, seen))
    tally.known = tally.answers.labels()
    held_out = replace(reading, option="--val-dataset")
    val_files = tuple(_checked_files(val_specs, held_out, tally, val_seen))
    return DataCheck(
        files=files,
        val_files=val_files,
        lengths=_lengths(sorted(tally.lengths), max_length),
        scripts=script_shares(tally.characters),
        overlap=len(seen & val_seen),
        answers=len(tally.known) if tally.known else None,
    )


@dataclass
class _Tally:
    encoder: Encoder | None
    lengths: list[int] = field(default_factory=list)
    characters: Counter[str] = field(default_factory=Counter)
    answers: AnswerTally = field(default_factory=AnswerTally)
    known: tuple[str, ...] | None = None


@dataclass
class _Found:
    """What is counted in one file."""

    rows: int = 0
    duplicates: int = 0
    duplicate_rows: list[int] = field(default_factory=list)
    empty_turns: int = 0
    empty_turn_rows: list[int] = field(default_factory=list)


def _checked_files(
    specs: Sequence[str], reading: Reading, tally: _Tally, seen: set[bytes]
) -> Iterator[FileCheck]:
    for spec in specs:
        source = find_source(spec, reading.dataset_info, reading.option)
        # A sample is drawn from all rows, so all must be fit to be trained on.
        left = None if source.selection.sampled else source.selection.rows
        for path in source.files:
            if left == 0:
                break
            file, found = FileReading(path, source, reading, Refusals("skip")), _Found()
            try:
                _look_through(file, left, found, tally, seen)
                problem = None
            except DataError as error:
                problem = str(error)
            left = None if left is None else left - found.rows
            yield _file_check(file, found, problem)


def _look_through(
    file: FileReading, limit: int | None, found: _Found, tally: _Tally, seen: set[bytes]
) -> None:
    with records(file.path, file.reading.keys) as opened:
        rows = islice(file_rows(file, opened), limit)
        while batch := list(islice(rows, _BATCH_ROWS)):
            for row in _encodable(batch, tally, file.refusals):
                error = unknown_answer(row, tally.known) if tally.known else None
                if error is None:
                    _count(row, found, tally, seen)
                else:
                    file.refusals.add(error)


def _file_check(file: FileReading, found: _Found, problem: str | None) -> FileCheck:
    reader = file.reader
    return FileCheck(
        path=str(file.path),
        kind=reader.kind if reader else "",
        shape=reader.columns.shape if reader else "",
        columns=used_columns(file),
        rows=found.rows,
        refused=file.refusals.listed(),
        problem=problem,
        duplicates=found.duplicates,
        duplicate_rows=tuple(found.duplicate_rows),
        empty_turns=found.empty_turns,
        empty_turn_rows=tuple(found.empty_turn_rows),
    )


def _encodable(batch: Sequence[Row], tally: _Tally, refusals: Refusals) -> Iterable[Row]:
    """Return the rows that the template renders, and keep their lengths."""
    encoder = tally.encoder
    if encoder is None:
        return batch
    try:
        examples = _encoded(batch, encoder)
    except RowError:
        return [row for row in batch if _encodes_alone(row, encoder, tally, refusals)]
    tally.lengths += map(_length, examples)
    return batch


def _encodes_alone(row: Row, encoder: Encoder, tally: _Tally, refusals: Refusals) -> bool:
    try:
        tally.lengths += map(_length, _encoded([row], encoder))
    except RowError as error:
        refusals.add(error)
        return False
    return True


def _encoded(rows: Sequence[Row], encoder: Encoder) -> tuple[Example, ...]:
    return tuple(encode(rows, encoder.tokenizer, encoder.template, None, encoder.train_on).examples)


def _length(example: Example) -> int:
    worse = len(example.rejected.input_ids) if example.rejected is not None else 0
    return max(len(example.input_ids), worse)


def _count(row: Row, found: _Found, tally: _Tally, seen: set[bytes]) -> None:
    found.rows += 1
    tally.answers.add(row)
    digest = fingerprint(row)
    if digest in seen:
        found.duplicates += 1
        if len(found.duplicate_rows) < _NUMBERS_KEPT:
            found.duplicate_rows.append(row.number)
    seen.add(digest)
    empty = sum(
        not (turn.content.strip() or turn.tool_calls or turn.parts) for turn in row.messages
    )
    found.empty_turns += empty
    if empty and len(found.empty_turn_rows) < _NUMBERS_KEPT:
        found.empty_turn_rows.append(row.number)
    tally.characters.update(row.text or "")
    # The two conversations of a preference differ in their ends.
    for turn in (*row.messages, *row.rejected[-1:]):
        tally.characters.update(turn.content)


def fingerprint(row: Row) -> bytes:
    """Return a hash of what a row says, wherever it stands."""

    def plain(turns: Sequence[Message]) -> list[object]:
        return [
            [
                turn.role,
                [each if isinstance(each, str) else {"image": each.sha256} for each in turn.parts]
                or turn.content,
                turn.reasoning,
                turn.loss,
                turn.weight,
                turn.tool_calls,
            ]
            for turn in turns
        ]

    said = [plain(row.messages), plain(row.rejected), row.tools, row.desirable, row.text]
    text = json.dumps(said, sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[:16]


def _lengths(ordered: Sequence[int], max_length: int) -> Lengths | None:
    if not ordered:
        return None
    # A bin begins at a power of two: 0, 1, 2, 4, 8 …
    bins = Counter(1 << (length.bit_length() - 1) if length else 0 for length in ordered)

    def percentile(share: float) -> int:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Lengths(
        total=sum(ordered),
        median=percentile(0.5),
        p90=percentile(0.9),
        p99=percentile(0.99),
        longest=ordered[-1],
        histogram=tuple(Bin(start, bins[start]) for start in sorted(bins)),
        max_length=max_length,
        too_long=sum(length > max_length for length in ordered),
    )
