"""Rows against what they are for: those that it can't learn from are errors, or left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mst.data.encode import Encoded
from mst.data.rows import Row
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
