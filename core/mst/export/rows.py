"""The run's own rows, as exports need them: some to calibrate by, some to judge by."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mst import rundir
from mst.data.encode import Example, encode
from mst.data.formats import read
from mst.data.prepare import Prepared, prepare, reading_of
from mst.data.rows import Row, changed_files
from mst.data.template import ChatTemplate
from mst.data.tokens import TextTokenizer
from mst.errors import DataError
from mst.evaluate.held_out import spread
from mst.registry import Registry
from mst.request import TrainRequest
from mst.seal.keys.ring import KeyRing
from mst.training.objectives import find_objective

# With fewer tokens than this a layer's second moments hardly have full rank.
CALIBRATION_TOKENS_AT_LEAST = 256
JUDGED_TOKENS = 16_000
# Rows that are asked for their answer: each costs a pass for every answer of the set.
ASKED = 120
PROMPTS = 64


@dataclass(frozen=True)
class ExportRows:
    """Rows of a run.

    Attributes:
        calibration: token ids of each row.
        judged: encoded rows, of `JUDGED_TOKENS` tokens or as many as there are.
        judged_from: what those are, in words.
        asked: rows of the judged whose answer the model is asked for; empty where nobody can say
            which answers are right.
        answers: the set of right answers.
        tokenizer: the model's.
        template: that the run was trained with.
    """

    calibration: Sequence[Sequence[int]] = field(repr=False)
    judged: Sequence[Example] = field(repr=False)
    judged_from: str
    asked: Sequence[Row] = field(repr=False)
    answers: Sequence[str] = field(repr=False)
    tokenizer: TextTokenizer
    template: ChatTemplate


def rows_of(
    run: Path,
    model_dir: Path,
    calibration: Sequence[str],
    count: int,
    registry: Registry,
    keys: KeyRing,
) -> ExportRows:
    """Read a run's rows again, and draw those that are needed.

    Args:
        run: the run directory.
        model_dir: holds the tokenizer and the template.
        calibration: files to calibrate by; empty for rows that the run was trained on.
        count: rows to calibrate by, at most.
        registry: has the objective of a plugin.
        keys: open encrypted files.

    Raises:
        DataError: the data are gone or have changed, or there is too little to calibrate by.
        EncryptionError: they can't be opened.
    """
    manifest = rundir.read_manifest(run)
    request = rundir.read_document(TrainRequest, run, rundir.REQUEST)
    objective = find_objective(request, registry)
    prepared = prepare(request, request.dataset, model_dir, None, objective, keys)
    before, after = (*manifest.data, *manifest.val_data), (*prepared.files, *prepared.val_files)
    if changed := changed_files(before, after):
        raise DataError(
            f"{changed[0]}, or an image that it names, is not what {run} was trained on: its"
            " SHA-256 is another than in run.json. Put the file back: an export is judged by the"
            " rows that were held out."
        )
    train: Sequence[Example] = prepared.train.examples
    drawn = _drawn(train, count, request.seed)
    held_out = prepared.val.examples if prepared.val else ()
    judged = _up_to(held_out or drawn, JUDGED_TOKENS)
    if calibration:
        reading = replace(reading_of(request, keys), option="--calibration")
        found = read(calibration, reading)
        # Nothing is learnt from them: a row needs no answer, and a long one has a beginning.
        given = encode(
            found.rows, prepared.tokenizer, prepared.template, prepared.max_length, "all", "right"
        )
        drawn = _drawn(given.examples, count, request.seed)
    source = f"held out in {run.name}" if held_out else "the run's training rows: it held out none"
    answers = prepared.answers or ()
    if any(each.images for each in (*drawn, *judged)):
        drawn, judged = _without_images(drawn, prepared), _without_images(judged, prepared)
        source += ", without their images"
        answers = ()
    asked = [each.row for each in judged] if answers and held_out else []
    if not any(len(each.input_ids) > 1 for each in judged):
        raise DataError(
            f"{run} has no row of two tokens to judge an export by. Train it on rows with answers."
        )
    return ExportRows(
        calibration=[list(each.input_ids) for each in drawn],
        judged=judged,
        judged_from=source,
        asked=[asked[place] for place in spread(range(len(asked)), ASKED)],
        answers=answers,
        tokenizer=prepared.tokenizer,
        template=prepared.template,
    )


def check_calibration(rows: Sequence[Sequence[int]]) -> None:
    """Make sure that there is enough to calibrate by.

    Raises:
        DataError: there are too few tokens.
    """
    tokens = sum(map(len, rows))
    if tokens < CALIBRATION_TOKENS_AT_LEAST:
        raise DataError(
            f"{len(rows)} rows of {tokens} tokens are too few to calibrate by: at least"
            f" {CALIBRATION_TOKENS_AT_LEAST} tokens are needed. Pass --calibration FILE with more"
            " rows, or --method rtn, which needs none."
        )


def _drawn(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    places = random.Random(f"mst:calibration:{seed}").sample(
        range(len(rows)), min(count, len(rows))
    )
    return [each for each in (rows[place] for place in places) if each.input_ids]


def _without_images(rows: Sequence[Example], prepared: Prepared) -> list[Example]:
    """Return the rows' text alone.

    An export changes nothing of the tower that sees images, and its weights are compared.
    """
    bare = [
        replace(
            each.row,
            messages=tuple(replace(turn, parts=()) for turn in each.row.messages),
        )
        for each in rows
    ]
    found = encode(bare, prepared.tokenizer, prepared.template, prepared.max_length, "all")
    return list(found.examples)


def _up_to(rows: Sequence[Example], tokens: int) -> list[Example]:
    """Return rows spread evenly over all, of about so many tokens."""
    total = sum(len(each.input_ids) for each in rows)
    step = max(1.0, total / tokens)
    return [rows[int(i * step)] for i in range(int(len(rows) / step))]
