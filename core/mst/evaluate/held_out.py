"""The rows that a model is judged by: a run's own held-out rows again, or files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mst import rundir
from mst.data.bad_rows import BadRows
from mst.data.formats import Reading, read
from mst.data.labels import label_set
from mst.data.prepare import parted, reading_of
from mst.data.rows import FileFacts, Row, changed_files
from mst.data.streamed import stream
from mst.data.usable import fit_rows
from mst.errors import EvaluationError
from mst.objective import Objective
from mst.registry import load
from mst.request import TrainRequest
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.training.objectives import find_objective


@dataclass(frozen=True)
class HeldOut:
    """Rows to judge by.

    Attributes:
        rows: all of them.
        files: where they came from.
        answers: the set of answers when the data is a classification.
        description: of the rows, for people.
        on_bad_row: what becomes of rows that a template refuses, as when the run was trained.
    """

    rows: tuple[Row, ...] = field(repr=False)
    files: tuple[FileFacts, ...]
    answers: tuple[str, ...] | None = field(repr=False)
    description: str
    on_bad_row: str = "error"


def of_files(specs: Sequence[str], keys: KeyRing = NO_KEYS) -> HeldOut:
    """Return all rows of data files.

    Raises:
        DataError: as the readers say.
    """
    found = read(specs, Reading(keys=keys))
    names = ", ".join(Path(each.path).name for each in found.files)
    return HeldOut(found.rows, found.files, label_set(found.rows), names)


def of_run(run: Path, keys: KeyRing = NO_KEYS) -> HeldOut:
    """Return the very rows that a run held out, in the order of its own evaluations.

    Raises:
        EvaluationError: it held out none, or the data have changed since.
        DataError: as the readers say.
    """
    manifest = rundir.read_manifest(run)
    request = rundir.read_document(TrainRequest, run, rundir.REQUEST)
    facts = (*manifest.data, *manifest.val_data)
    _all_there(run, facts)
    objective = find_objective(request, load())
    found, all_files = _split_again(request, reading_of(request, keys), objective)
    _unchanged(run, facts, all_files)
    rows = found.rows
    if rows and request.on_bad_row == "skip":
        rows = fit_rows(objective, rows, BadRows("skip"))
    if not rows:
        raise EvaluationError(
            f"{run} held out no rows (--val-size 0), so nothing is left to judge it by. Pass files"
            " that it was not trained on: --dataset FILE."
        )
    return replace(found, rows=rows, description=f"held out in {run.name}")


def _split_again(
    request: TrainRequest, reading: Reading, objective: Objective
) -> tuple[HeldOut, tuple[FileFacts, ...]]:
    """Return what a run held out, and the facts of all its files."""
    if request.streaming:
        # Nothing is encoded here: held-out rows are known by their places alone.
        streamed = stream(request, request.dataset, reading, objective, lambda row: [])
        files = streamed.val_files or streamed.files
        held = HeldOut(streamed.val, files, None, "", request.on_bad_row)
        return held, (*streamed.files, *streamed.val_files)
    found = read(request.dataset, reading)
    train_rows, held_out = parted(request, found, reading)
    files, answers = held_out.files or found.files, label_set(train_rows)
    held = HeldOut(held_out.rows, files, answers, "", request.on_bad_row)
    return held, (*found.files, *held_out.files)


def _all_there(run: Path, facts: Sequence[FileFacts]) -> None:
    """Make sure that a run's data files are where they were.

    Raises:
        EvaluationError: one is gone.
    """
    gone = [each.path for each in facts if not Path(each.path).is_file()]
    if gone:
        raise EvaluationError(
            f"{run} was trained on {gone[0]}, which is gone, so its held-out rows can't be told."
            " Put the file back, or pass other rows: --dataset FILE."
        )


def _unchanged(run: Path, before: Sequence[FileFacts], after: Sequence[FileFacts]) -> None:
    """Make sure that a run's data files hold what they held.

    Raises:
        EvaluationError: one differs.
    """
    if changed := changed_files(before, after):
        raise EvaluationError(
            f"{changed[0]}, or an image that it names, is not what {run} was trained on (its"
            " SHA-256 differs from run.json's), so other rows would be judged than were held out."
            " Put the file back, or pass other rows: --dataset FILE."
        )


def question(row: Row) -> Row | None:
    """Return a row cut after its last answer, which is the reference; None when it has none."""
    for last in range(len(row.messages) - 1, -1, -1):
        message = row.messages[last]
        if message.role == "assistant":
            answered = message.content.strip() and last
            return replace(row, messages=row.messages[: last + 1]) if answered else None
    return None


def spread(places: Sequence[int], at_most: int | None) -> tuple[int, ...]:
    """Return at most so many of the places, spread evenly over them; all for None."""
    if at_most is None or len(places) <= at_most:
        return tuple(places)
    step = len(places) / at_most
    return tuple(places[int(index * step)] for index in range(at_most))
