"""Rows that are read and tokenized when a step asks for them, for sets larger than memory."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import overload

from mst.data.encode import Example
from mst.data.formats import Reading, RowReader, row_reader
from mst.data.line_index import LineIndex, index_lines, line_at, line_number
from mst.data.permutation import permuted
from mst.data.refusals import Refusals, RowError
from mst.data.rows import FileFacts, Row
from mst.data.sources import find_source
from mst.errors import DataError

# Encoded rows that are kept: a step asks for each of its own several times. 2048 tokens take 16 kB.
KEPT_ROWS = 1024


@dataclass(frozen=True, eq=False)
class StreamedFiles:
    """The rows of JSONL files, by their number over all files.

    Attributes:
        indices: of each file.
        readers: of each file.
        ends: rows in it and those before.
    """

    indices: tuple[LineIndex, ...]
    readers: tuple[RowReader, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        """Return how many rows there are."""
        return self.ends[-1]

    def row(self, number: int) -> Row:
        """Return one row.

        Raises:
            RowError: it is no row.
        """
        file = bisect_right(self.ends, number)
        index = self.indices[file]
        within = number - (self.ends[file] - len(index.starts))
        return self.readers[file].parse_line(line_number(index, within), line_at(index, within))


def open_files(
    specs: Sequence[str], reading: Reading
) -> tuple[StreamedFiles, tuple[FileFacts, ...]]:
    """Index files and return their rows, and what is recorded of them.

    Raises:
        DataError: one is no .jsonl file, or none of a known shape; `#N` was asked for.
    """
    refusals = Refusals(reading.on_bad_row)
    indices, readers = [], []
    for spec in specs:
        source = find_source(spec, reading.dataset_info)
        if source.selection.rows is not None:
            raise DataError(
                f"--streaming takes whole files, found a choice of rows ({source.selection})."
                " Leave the choice out, or --streaming."
            )
        for path in source.files:
            indices.append(index_lines(path, refusals, reading.keys))
            readers.append(row_reader(path, source, reading))
    ends = tuple(accumulate(len(each.starts) for each in indices))
    facts = tuple(
        FileFacts(
            path=index.file,
            sha256=index.sha256,
            kind=reader.kind,
            shape=reader.columns.shape,
            columns=tuple(f"{role}={name}" for role, name in reader.columns.needed.items()),
            rows=len(index.starts),
            key=index.key,
        )
        for index, reader in zip(indices, readers, strict=True)
    )
    return StreamedFiles(tuple(indices), tuple(readers), ends), facts


class StreamedRows(Sequence[Example]):
    """Training rows, read and encoded when they are asked for.

    A row that contributes nothing (too long, nothing to learn, or bad and skipped) has no tokens.
    """

    def __init__(
        self,
        files: StreamedFiles,
        held_out: int,
        seed: int,
        on_bad_row: str,
        encode_row: Callable[[Row], Example | str],
    ) -> None:
        """Leave the first `held_out` rows of a seeded order out.

        Args:
            files: the rows.
            held_out: how many are not trained on.
            seed: of the order.
            on_bad_row: "error" or "skip".
            encode_row: returns the example, or why there is none.
        """
        self._files, self._held_out, self._on_bad_row = files, held_out, on_bad_row
        self._key = f"mst:split:{seed}"
        self._encode = encode_row
        self._kept: OrderedDict[int, Example] = OrderedDict()
        self._seen = bytearray(-(-len(files) // 8))
        self._left_out: Counter[str] = Counter()

    def __len__(self) -> int:
        """Return how many rows are trained on."""
        return len(self._files) - self._held_out

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        """Return an encoded row.

        Raises:
            DataError: the row is bad, and bad rows are errors.
            IndexError: there are fewer rows.
        """
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place not in self._kept:
            self._kept[place] = self._load(place)
            if len(self._kept) > KEPT_ROWS:
                self._kept.popitem(last=False)
        return self._kept[place]

    def row(self, place: int) -> Row:
        """Return a row before encoding; held-out rows lie at places below 0."""
        return self._files.row(permuted(self._held_out + place, len(self._files), self._key))

    def left_out(self) -> dict[str, int]:
        """Return how many of the rows that were read contributed nothing, by reason."""
        return dict(self._left_out)

    def _load(self, place: int) -> Example:
        try:
            found = self._encode(self.row(place))
        except RowError as error:
            if self._on_bad_row == "error":
                raise
            found = error.reason
        if not isinstance(found, str):
            return found
        seen, bit = divmod(place, 8)
        if not self._seen[seen] >> bit & 1:
            self._seen[seen] |= 1 << bit
            self._left_out[found] += 1
        return Example(array("i"), array("i"), Row((), "", 0))


def row_tokens(example: Example) -> int:
    """Return the tokens of an encoded row; a preference counts with both conversations."""
    return len(example.input_ids) + (len(example.rejected.input_ids) if example.rejected else 0)


class StreamedSizes(Sequence[int]):
    """Tokens of streamed rows; 0 of one that contributes nothing."""

    def __init__(self, rows: StreamedRows) -> None:
        """Measure `rows` when asked."""
        self._rows = rows

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        """Return a row's tokens, of both conversations of a preference."""
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        return row_tokens(self._rows[place])
