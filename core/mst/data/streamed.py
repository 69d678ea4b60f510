"""From a request to rows that are streamed: index, held-out rows, and a sample for the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mst.data.encode import Example
from mst.data.formats import Reading, read
from mst.data.refusals import RowError
from mst.data.rows import FileFacts, Row
from mst.data.split import held_out_rows
from mst.data.streaming import StreamedRows, open_files
from mst.data.usable import check_row
from mst.errors import DataError, UsageError
from mst.objective import Objective
from mst.request import TrainRequest

# Rows whose lengths stand for those of all; the 99th percentile of so many is known within 1 %.
SAMPLED_ROWS = 2000
# Held-out rows are held in memory, and more of them would tell no more.
HELD_OUT_AT_MOST = 1000


@dataclass(frozen=True)
class Streamed:
    """What streaming prepares.

    Attributes:
        train: the rows that are trained on.
        sample: some of them, before encoding.
        val: the rows held out, before encoding.
        files: what was indexed.
        val_files: what held-out rows were read from, where they have files of their own.
    """

    train: StreamedRows
    sample: tuple[Row, ...]
    val: tuple[Row, ...]
    files: tuple[FileFacts, ...]
    val_files: tuple[FileFacts, ...]


def check_streaming(request: TrainRequest) -> None:
    """Make sure that nothing was asked for that needs all rows at once.

    Raises:
        UsageError: names it.
    """
    for asked, flag, why in (
        (request.packing, "--packing", "fills its blocks by the lengths of all rows"),
        (
            request.precompute_ref_log_probs,
            "--precompute-ref-log-probs",
            "keeps a number of each token of all rows",
        ),
    ):
        if asked:
            raise UsageError(
                f"--streaming and {flag} were both given, but {flag} {why}. Pass one of them."
            )


def stream(
    request: TrainRequest,
    dataset: Sequence[str],
    reading: Reading,
    objective: Objective,
    encode_row: Callable[[Row], list[Example]],
) -> Streamed:
    """Index the files that a request names, and read held-out rows and a sample.

    Args:
        request: the options of data.
        dataset: the files, with the default filled in.
        reading: how they are read.
        objective: what the rows are for.
        encode_row: returns what is kept of a row.

    Raises:
        DataError: as `mst.data.streaming.open_files`, or a row is bad.
    """
    files, facts = open_files(dataset, reading)
    val: tuple[Row, ...] = ()
    val_files: tuple[FileFacts, ...] = ()
    held_out = 0
    if request.val_dataset:
        found = read(request.val_dataset, replace(reading, option="--val-dataset"))
        val, val_files = found.rows, found.files
    else:
        held_out = held_out_rows(len(files), request.val_size)
        if request.val_size < 1:
            held_out = min(held_out, HELD_OUT_AT_MOST)
    if held_out >= len(files):
        raise DataError(
            f"--val-size {request.val_size:g} holds out {held_out} of {len(files)} rows, which"
            " leaves none to train on. Pass a smaller --val-size, or 0 for none."
        )

    def encoded(row: Row) -> Example | str:
        check_row(objective, row)
        parts = encode_row(row)
        if len(parts) != 1:  # a text that was cut into pieces has several
            return "longer than --max-length"
        return parts[0] if objective.usable(parts[0]) else "nothing to learn"

    train = StreamedRows(files, held_out, request.seed, reading.on_bad_row, encoded)
    rows = {
        place: row
        for place in range(-held_out, min(SAMPLED_ROWS, len(train)))
        if (row := _good(train, place, reading.on_bad_row)) is not None
    }
    return Streamed(
        train=train,
        sample=tuple(row for place, row in rows.items() if place >= 0),
        val=(*val, *(row for place, row in rows.items() if place < 0)),
        files=facts,
        val_files=val_files,
    )


def _good(train: StreamedRows, place: int, on_bad_row: str) -> Row | None:
    try:
        return train.row(place)
    except RowError:
        if on_bad_row == "error":
            raise
        return None
