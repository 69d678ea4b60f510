"""One model at work on the rows: it is loaded, asked, and let go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mst.data.rows import Row
from mst.evaluate.answers import greedy_answers
from mst.evaluate.encoding import Encoding
from mst.evaluate.job import EvalJob, Subject
from mst.evaluate.labels import LabelAnswer, label_answers, questions
from mst.evaluate.likelihood import row_losses
from mst.evaluate.text_metrics import TEXT_METRICS
from mst.seal.keys.ring import KeyRing
from mst.waiting import told_while

if TYPE_CHECKING:
    import torch
    from rich.console import Console


@dataclass(frozen=True)
class Task:
    """What is computed of which rows.

    Attributes:
        places: of the rows, ascending.
        questions: those of them that end with an answer, by place.
        metrics: names.
        answers: the set, when the data is a classification.
        generate: answers are wanted, whatever the metrics need.
    """

    places: tuple[int, ...]
    questions: Mapping[int, Row] = field(repr=False)
    metrics: tuple[str, ...]
    answers: tuple[str, ...] | None = field(repr=False)
    generate: bool


@dataclass(frozen=True)
class Measured:
    """What one model made of the rows; None for what was not asked.

    Attributes:
        losses: of each row the sum of its label tokens' losses, and their number.
        labels: of each question.
        answers: to each question, without white space at both ends.
        loss_tokens_per_second: read, padding not counted.
        answer_tokens_per_second: generated.
        seconds: in all, loading included.
    """

    losses: tuple[tuple[float, float], ...] | None
    labels: tuple[LabelAnswer, ...] | None
    answers: tuple[str, ...] | None = field(repr=False)
    loss_tokens_per_second: float | None
    answer_tokens_per_second: float | None
    seconds: float


def measure(
    job: EvalJob,
    subject: Subject,
    encoding: Encoding,
    task: Task,
    console: Console,
    keys: KeyRing,
) -> Measured:
    """Load a model, compute what the task says, and free it; `keys` open that of an encrypted run.

    Raises:
        MstError: it can't be loaded, or the device gives out.
    """
    from mst.training.faults import free_memory, named

    began = time.perf_counter()
    with told_while(console, f"loading {subject.name}") as show:

        def tell(doing: str, rows: int) -> Callable[[int], None]:
            return lambda done: show(f"{subject.name}: {doing}, {done} of {rows} rows")

        device = _device(job)
        with named(device, f"while {subject.name} was being loaded"):
            model = _load(job, subject, device, keys)
        with named(device, f"while {subject.name} was being evaluated"):
            losses, reading = _losses(model, job, subject, encoding, task, tell)
            labels = _labels(model, job, subject, encoding, task, tell)
            answers, writing = _answers(model, job, subject, encoding, task, tell)
        del model
        free_memory(device)
    seconds = time.perf_counter() - began
    return Measured(losses, labels, answers, reading, writing, round(seconds, 3))


def _device(job: EvalJob) -> torch.device:
    from mst.probe import activate
    from mst.registry import load

    activate(load(), job.backend)
    import torch

    device = torch.device(job.torch_device)
    if device.type == "cpu":
        torch.set_num_threads(job.threads)
    return device


def _load(job: EvalJob, subject: Subject, device: torch.device, keys: KeyRing) -> torch.nn.Module:
    from mst.tuned import load, load_dequantized

    if subject.dequantized:
        return load_dequantized(subject.model, job.attention, device, subject.dtype, keys)
    return load(subject.model, subject.dtype, job.attention, device, keys)


_Tell = Callable[[str, int], Callable[[int], None]]


def _losses(
    model: torch.nn.Module,
    job: EvalJob,
    subject: Subject,
    encoding: Encoding,
    task: Task,
    tell: _Tell,
) -> tuple[tuple[tuple[float, float], ...] | None, float | None]:
    """Return each row's loss and tokens, and tokens a second."""
    import torch

    if "loss" not in task.metrics:
        return None, None
    # A plain text's windows are examples of their own.
    owners = [(place, each) for place in task.places for each in encoding.examples[place]]
    began = time.perf_counter()
    found = row_losses(
        model,
        [each for _, each in owners],
        encoding.tokenizer.pad_token_id,
        getattr(torch, subject.dtype),
        job.request.batch_rows,
        subject.loss_tokens,
        tell("loss", len(owners)),
    )
    seconds = time.perf_counter() - began
    sums = dict.fromkeys(task.places, (0.0, 0.0))
    for (place, _), (loss, tokens) in zip(owners, found, strict=True):
        sums[place] = sums[place][0] + loss, sums[place][1] + tokens
    read = sum(len(each.input_ids) for _, each in owners)
    return tuple(sums.values()), round(read / seconds, 1)


def _labels(
    model: torch.nn.Module,
    job: EvalJob,
    subject: Subject,
    encoding: Encoding,
    task: Task,
    tell: _Tell,
) -> tuple[LabelAnswer, ...] | None:
    import torch

    if "labels" not in task.metrics or task.answers is None:
        return None
    found = label_answers(
        model,
        list(task.questions.values()),
        task.answers,
        encoding.tokenizer,
        encoding.template,
        getattr(torch, subject.dtype),
        tell("label accuracy", len(task.questions)),
        job.request.batch_rows,
        subject.answer_tokens,
    )
    return tuple(found)


def _answers(
    model: torch.nn.Module,
    job: EvalJob,
    subject: Subject,
    encoding: Encoding,
    task: Task,
    tell: _Tell,
) -> tuple[tuple[str, ...] | None, float | None]:
    """Return the answer to each question, and tokens a second."""
    import torch

    if not task.generate and not set(task.metrics) & set(TEXT_METRICS):
        return None, None
    tokenizer = encoding.tokenizer
    asked = questions(list(task.questions.values()), tokenizer, encoding.template)
    prompts = [each.prompt for each in asked]
    began = time.perf_counter()
    said = greedy_answers(
        model,
        prompts,
        tokenizer.eos_token_ids,
        tokenizer.pad_token_id,
        getattr(torch, subject.dtype),
        _room(prompts, job.request.max_new_tokens, subject.context),
        job.request.batch_rows,
        subject.answer_tokens,
        tell("answers", len(prompts)),
    )
    seconds = time.perf_counter() - began
    texts = tuple(tokenizer.decode(each, skip_special_tokens=True).strip() for each in said)
    return texts, round(sum(map(len, said)) / seconds, 1)


def _room(prompts: Sequence[Sequence[int]], most: int, context: int | None) -> list[int]:
    """Return how long each answer may be: what the context leaves, at least one token."""
    if context is None:
        return [most] * len(prompts)
    return [max(1, min(most, context - len(each))) for each in prompts]
