"""Run as `python -m mst.evaluate.worker JOB HANDLE [KEYS]`: judge a model, or two on the same rows.

Rows are read and encoded, and the user's metric is loaded, before the first model is. The report
goes to the open file HANDLE, figures alone; rows and answers go to --predictions or nowhere.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import mst
from mst import rundir, serial
from mst.data.rows import Row
from mst.durable import write_text
from mst.errors import EvaluationError
from mst.evaluate.choice import chosen_metrics
from mst.evaluate.encoding import Encoding, encode_rows, kept_by_all
from mst.evaluate.figures import RESAMPLES, Figure, Statistic, figure, mean_of, ratio_of
from mst.evaluate.held_out import HeldOut, of_files, of_run, question, spread
from mst.evaluate.job import EvalJob, Subject
from mst.evaluate.measure import Measured, Task, measure
from mst.evaluate.report import EvalReport, Judged
from mst.evaluate.text_metrics import TEXT_METRICS, bleu_tokenizer
from mst.evaluate.user_metric import load_metric, user_statistic
from mst.extensions import hide_extensions, hide_packages
from mst.seal.keys.ring import NO_KEYS, KeyRing, inherited
from mst.user_function import UserFunction
from mst.worker_process import StopAsked, die_with_parent, guarded

if TYPE_CHECKING:
    from rich.console import Console


def work(job: EvalJob, handle: int, keys: KeyRing = NO_KEYS) -> None:
    """Judge the job's models and write the report to an open file.

    Raises:
        MstError: what the user can mend.
    """
    from rich.console import Console

    # Standard output is for the report.
    console = Console(stderr=True, highlight=False, markup=False)
    request = job.request
    metric = None if request.metric_file is None else load_metric(request.metric_file)
    with console.status("reading and tokenizing the rows"):
        held = of_files(request.dataset, keys) if job.run is None else of_run(Path(job.run), keys)
        subjects = [each for each in (job.subject, job.other) if each is not None]
        encodings = [encode_rows(held.rows, job, each, held.on_bad_row) for each in subjects]
    task, notes = _task(job, held, encodings, metric is not None)
    found = [
        measure(job, each, encoding, task, console, keys)
        for each, encoding in zip(subjects, encodings, strict=True)
    ]
    same_tokens = encodings[0].fingerprint == encodings[-1].fingerprint
    figures, more = _figures(job, task, found, metric, same_tokens, console)
    report = _report(job, held, task, encodings[0], found, figures, (*notes, *more))
    if request.predictions is not None and found[0].answers is not None:
        _write_predictions(Path(request.predictions), task, found)
    os.write(handle, serial.dumps(report).encode())


def _task(
    job: EvalJob, held: HeldOut, encodings: list[Encoding], own: bool
) -> tuple[Task, tuple[str, ...]]:
    """Return what is computed of which rows, and what to tell about it."""
    places = spread(kept_by_all(encodings), job.request.limit)
    asked = {place: question(held.rows[place]) for place in places}
    questions = {place: row for place, row in asked.items() if row is not None}
    answers = None if held.answers is None else len(held.answers)
    own = own or job.request.predictions is not None
    metrics, notes = chosen_metrics(job.request.metrics, len(questions), answers, own)
    return Task(places, questions, metrics, held.answers, own), notes


def _figures(
    job: EvalJob,
    task: Task,
    found: list[Measured],
    metric: UserFunction | None,
    same_tokens: bool,
    console: Console,
) -> tuple[tuple[Figure, ...], tuple[str, ...]]:
    """Return every metric's figures, beside the other model's, and what to tell about them."""
    notes = []
    with console.status("computing the metrics"):
        ours, theirs = (_statistics(task, each, metric) for each in (found[0], found[-1]))
        figures = []
        for mine, other in zip(ours, theirs, strict=True):
            paired = len(found) > 1 and (same_tokens or mine.name not in _PER_TOKEN)
            figures.append(figure(mine, other if paired else None, job.request.seed))
    if len(task.places) < _FEW_ROWS:
        notes.append(f"{len(task.places)} rows are few: with so few, intervals come out too narrow")
    if len(found) > 1 and not same_tokens and "loss" in task.metrics:
        notes.append("the tokenizers differ, so losses a token are not compared")
    if "bleu" in task.metrics:
        kind = bleu_tokenizer(_references(task))
        notes.append(f"BLEU splits words as sacrebleu's tokenizer {kind}")
    return tuple(figures), tuple(notes)


_PER_TOKEN = ("loss", "perplexity")
# The percentile bootstrap of a mean of normal draws covers 92 % at 10 rows and 94 % at 30.
_FEW_ROWS = 30


def _references(task: Task) -> list[str]:
    return [row.messages[-1].content.strip() for row in task.questions.values()]


def _statistics(task: Task, found: Measured, metric: UserFunction | None) -> list[Statistic]:
    import math

    statistics: list[Statistic] = []
    if found.losses is not None:
        loss = ratio_of("loss", found.losses, higher_is_better=False)
        # A mean loss past 700 has no perplexity that a float holds.
        perplexity = Statistic(
            "perplexity",
            loss.rows,
            lambda sums: math.exp(min(700.0, loss.value(sums))),
            higher_is_better=False,
        )
        statistics += [loss, perplexity]
    if found.labels is not None:
        statistics += [
            mean_of("label_accuracy", [each.restricted for each in found.labels]),
            mean_of("label_accuracy_free", [each.free for each in found.labels]),
        ]
    if found.answers is not None:
        references = _references(task)
        for name in task.metrics:
            if name in TEXT_METRICS:
                statistics += TEXT_METRICS[name](found.answers, references)
        if metric is not None:
            statistics.append(user_statistic(metric, found.answers, references))
    return statistics


def _report(
    job: EvalJob,
    held: HeldOut,
    task: Task,
    encoding: Encoding,
    found: list[Measured],
    figures: tuple[Figure, ...],
    notes: tuple[str, ...],
) -> EvalReport:
    examples = [each for place in task.places for each in encoding.examples[place]]
    return EvalReport(
        mst_version=mst.__version__,
        created=rundir.now(),
        device=job.torch_device,
        rows_of=held.description,
        data=held.files,
        rows=len(task.places),
        left_out=len(held.rows) - len(task.places),
        tokens=sum(len(each.input_ids) for each in examples),
        label_tokens=sum(label >= 0 for each in examples for label in each.labels),
        model=_judged(job.subject, found[0]),
        compared_with=None if job.other is None else _judged(job.other, found[-1]),
        figures=figures,
        resamples=RESAMPLES,
        seed=job.request.seed,
        notes=notes,
    )


def _judged(subject: Subject, found: Measured) -> Judged:
    return Judged(
        name=subject.name,
        model_sha256=subject.model_sha256,
        step=subject.model.step,
        dtype=subject.dtype,
        loss_tokens_per_second=found.loss_tokens_per_second,
        answer_tokens_per_second=found.answer_tokens_per_second,
        seconds=found.seconds,
    )


def _write_predictions(path: Path, task: Task, found: list[Measured]) -> None:
    """Write the rows' references and answers, for the user's eyes alone.

    Raises:
        EvaluationError: the file can't be written.
    """
    lines = []
    for place, row in enumerate(task.questions.values()):
        lines.append(json.dumps(_prediction(row, place, found), ensure_ascii=False) + "\n")
    try:
        write_text(path, "".join(lines), 0o600)
    except OSError as error:
        raise EvaluationError(
            f"cannot write --predictions {path}: {error.strerror}. Choose another file."
        ) from None


def _prediction(row: Row, place: int, found: list[Measured]) -> dict[str, object]:
    said = [each.answers[place] for each in found if each.answers is not None]
    line: dict[str, object] = {"file": row.file, "row": row.number}
    line |= {"reference": row.messages[-1].content, "prediction": said[0]}
    return line | ({"compared_prediction": said[1]} if len(said) > 1 else {})


def main(argv: list[str]) -> int:
    """Do the job that the first argument describes."""
    die_with_parent()
    StopAsked()
    job = serial.from_json(EvalJob, json.loads(argv[0]))
    if job.backend == "cpu":
        hide_extensions()
    subjects = [each for each in (job.subject, job.other) if each is not None]
    quantized = any(each.model.quantization != "none" for each in subjects)
    hide_packages(keep=("bitsandbytes",) if quantized else ())
    keys = inherited(int(argv[2]) if len(argv) > 2 else None)
    return guarded(lambda: work(job, int(argv[1]), keys))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
