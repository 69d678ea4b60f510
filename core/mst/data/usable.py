"""Rows against what they are for: those that it can't learn from are errors, or left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from mst.data.encode import Encoded
from mst.data.images import row_images
from mst.data.labels import unknown_answer
from mst.data.refusals import Refusals
from mst.data.rows import DataSet, Row
from mst.errors import DataError
from mst.objective import Objective


def check_rows(objective: Objective, rows: Iterable[Row]) -> None:
    """Make sure that every row has what the objective needs.

    Raises:
        DataError: names the first that has not: its file, its number and what to do.
    """
    for row in rows:
        lacking = objective.lacks(row)
        if lacking:
            raise DataError(
                f"{row.file}, row {row.number}: --task {objective.name} was asked for; the row"
                f" {lacking}."
            )
        if objective.name != "sft" and row_images(row):
            raise DataError(
                f"{row.file}, row {row.number}: the row has images, and --task {objective.name}"
                " learns from text alone. Pass --task sft, or remove the row."
            )


def with_known_answers(found: DataSet, answers: Sequence[str], on_bad_row: str) -> DataSet:
    """Return held-out rows without those whose answer is none of `answers`, which are reported.

    Raises:
        DataError: bad rows are errors, or none is left.
    """
    refusals = {each.path: Refusals(on_bad_row) for each in found.files}
    kept = []
    for row in found.rows:
        error = unknown_answer(row, answers)
        if error is None:
            kept.append(row)
        else:
            refusals[row.file].add(error)
    if not kept:
        raise DataError(
            f"none of the answers of --val-dataset is one of the {len(answers)} of --dataset. Are"
            " they of the same task? If so, pass --label-accuracy off."
        )
    files = []
    for each in found.files:
        listed = refusals[each.path].listed()
        rows = each.rows - sum(refused.rows for refused in listed)
        files.append(replace(each, rows=rows, skipped=(*each.skipped, *map(str, listed))))
    return DataSet(tuple(kept), tuple(files))


def usable(objective: Objective, found: Encoded) -> Encoded:
    """Return the encoded rows without those that teach nothing, which are counted.

    Raises:
        DataError: none is left.
    """
    kept = tuple(each for each in found.examples if objective.usable(each))
    if not kept:
        raise DataError(
            f"--task {objective.name} was asked for; all {len(found.examples)} rows have twice the"
            " same answer, or none within --max-length, so there is nothing to learn. Look at the"
            " file, or pass a larger --max-length."
        )
    return replace(found, examples=kept, unusable=len(found.examples) - len(kept))
