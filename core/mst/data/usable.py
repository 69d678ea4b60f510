"""Rows against what they are for: those that it can't learn from are errors, or left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from mst.data.bad_rows import BadRows
from mst.data.encode import Encoded, Example
from mst.data.images import row_images
from mst.data.labels import unknown_answer
from mst.data.refusals import Place, RowError
from mst.data.rows import DataSet, Row
from mst.errors import DataError
from mst.objective import Objective


def fit_rows(objective: Objective, rows: Iterable[Row], bad: BadRows) -> tuple[Row, ...]:
    """Return the rows that have what the objective needs; the others go to `bad`.

    Raises:
        DataError: bad rows are errors, or none is left.
    """
    kept, given = [], tuple(rows)
    for row in given:
        error = _unfit(objective, row)
        if error is None:
            kept.append(row)
        else:
            bad.add(error)
    if given and not kept:
        raise bad.none_left()
    return tuple(kept)


def check_row(objective: Objective, row: Row) -> None:
    """Make sure that a row has what the objective needs.

    Raises:
        RowError: it has not.
    """
    error = _unfit(objective, row)
    if error is not None:
        raise error


def _unfit(objective: Objective, row: Row) -> RowError | None:
    where = Place(row.file, row.number)
    lacking = objective.lacks(row)
    if lacking:
        reason = f"--task {objective.name} was asked for; the row {lacking.removesuffix('.')}"
        return RowError(where, reason, "")
    if objective.name != "sft" and row_images(row):
        reason = f"the row has images, and --task {objective.name} learns from text alone"
        return RowError(where, reason, "Pass --task sft, or remove the row.")
    return None


def check_context(objective: Objective, examples: Sequence[Example], context: int | None) -> None:
    """Make sure that the answers which an objective samples fit behind their prompts.

    Args:
        objective: what the rows are for.
        examples: encoded.
        context: the model's longest, in tokens; None when nobody knows.

    Raises:
        DataError: some don't; says how many, and what to pass.
    """
    if context is None or not objective.samples:
        return
    wholes = [max(len(one.input_ids) for one in objective.sequences(each)) for each in examples]
    over = sum(whole > context for whole in wholes)
    if not over:
        return
    longest = max(wholes) - objective.samples
    fits = context - longest
    advice = f"Pass --max-completion-length {fits}" if fits > 0 else "Pass a smaller --max-length"
    raise DataError(
        f"--max-completion-length {objective.samples} was asked for; with it, {over} of"
        f" {len(examples)} rows get longer than the {context} tokens that the model reads: the"
        f" longest prompt has {longest}. {advice}, or shorten the prompts."
    )


def with_known_answers(found: DataSet, answers: Sequence[str], on_bad_row: str) -> DataSet:
    """Return held-out rows without those whose answer is none of `answers`, which are reported.

    Raises:
        DataError: bad rows are errors, or none is left.
    """
    bad = BadRows(on_bad_row)
    kept = []
    for row in found.rows:
        error = unknown_answer(row, answers)
        if error is None:
            kept.append(row)
        else:
            bad.add(error)
    if not kept:
        raise DataError(
            f"none of the answers of --val-dataset is one of the {len(answers)} of --dataset. Are"
            " they of the same task? If so, pass --label-accuracy off."
        )
    return DataSet(tuple(kept), bad.recorded(found.files))


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
