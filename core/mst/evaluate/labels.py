"""Accuracy of a model on rows whose answer is one of a few: free, and restricted to the set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mst.data.rows import Message, Row
from mst.data.template import ChatTemplate, render
from mst.data.tokens import TextTokenizer
from mst.evaluate.batching import batches, in_passes
from mst.evaluate.best_answer import best_answers
from mst.evaluate.reading import (
    Prefix,
    continued,
    generated,
    parts_by_row,
    read,
    read_shared,
    rows_of,
)
from mst.training.loss import compute_in

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# Held-out rows that are asked: at most so many, spread evenly, so that measuring stays short.
# 240 rows give a standard error of about 2 points at 90 %.
ROWS_AT_MOST = 240
ROWS_A_PASS = 16


@dataclass(frozen=True)
class LabelAccuracy:
    """Shares of rows answered rightly.

    Attributes:
        rows: rows that were asked.
        free: greedy generation, cut at the end of the turn, equal to the answer but for case and
            white space around it.
        restricted: the answer of the set with the highest log-probability, its end of turn
            included.
    """

    rows: int
    free: float
    restricted: float


@dataclass(frozen=True)
class LabelAnswer:
    """Whether one row was answered rightly, in the two ways of `LabelAccuracy`."""

    free: bool
    restricted: bool


@dataclass(frozen=True)
class Question:
    """A row as a question: the tokens up to where the model answers, and the right answer."""

    prompt: tuple[int, ...]
    answer: str


def chosen_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return at most `ROWS_AT_MOST` rows, evenly spread."""
    step = max(1.0, len(rows) / ROWS_AT_MOST)
    return tuple(rows[int(i * step)] for i in range(min(len(rows), ROWS_AT_MOST)))


def questions(
    rows: Sequence[Row], tokenizer: TextTokenizer, template: ChatTemplate
) -> tuple[Question, ...]:
    """Render each row up to its answer."""
    texts = [
        render(template, each.messages[:-1], add_generation_prompt=True, tools=each.tools)
        for each in rows
    ]
    return tuple(
        Question(tuple(encoded.ids), row.messages[-1].content.strip())
        for row, encoded in zip(rows, tokenizer.encode_batch(texts), strict=True)
    )


def answer_tokens(
    row: Row, answers: Sequence[str], tokenizer: TextTokenizer, template: ChatTemplate
) -> tuple[tuple[int, ...], ...]:
    """Return each answer as the tokens that the template puts after a prompt, with its end.

    Args:
        row: any row of the set; what follows the prompt depends on the answer alone.
        answers: the set.
        tokenizer: the model's.
        template: the model's.
    """
    before = row.messages[:-1]
    start = len(render(template, before, add_generation_prompt=True, tools=row.tools))
    found = []
    for answer in answers:
        text = render(template, (*before, Message("assistant", answer)), tools=row.tools)[start:]
        ids = tokenizer.encode(text).ids
        ends = [i for i, token in enumerate(ids) if token in tokenizer.eos_token_ids]
        found.append(tuple(ids[: ends[0] + 1] if ends else ids))
    return tuple(found)


def _likeliest(
    model: torch.nn.Module, prefix: Prefix, answers: Sequence[tuple[int, ...]]
) -> list[int]:
    """Return, for each prompt, the place of the answer with the highest log-probability."""
    import copy

    import torch

    device, everyone = prefix.logits.device, list(range(prefix.logits.shape[0]))
    held, holds = prefix, everyone

    def ask(rows: Sequence[int], paths: Sequence[tuple[int, ...]]) -> torch.Tensor:
        nonlocal held, holds
        if len(rows) < len(holds) and parts_by_row(prefix.cache):
            held, holds = rows_of(held, [holds.index(row) for row in rows]), list(rows)
        own = dict(zip(rows, paths, strict=True))
        width = max(map(len, paths))
        padded = [own.get(row, ()) for row in holds]
        tokens = torch.tensor([[*each, *[0] * (width - len(each))] for each in padded])
        # Copied, because every path, and free generation, continues from the same prompts.
        again = Prefix(copy.deepcopy(held.cache), held.mask, held.logits)
        logits = continued(model, again, tokens.to(device), torch.ones_like(tokens).to(device))
        return logits[[holds.index(row) for row in rows]]

    return best_answers(prefix.logits, answers, ask)


def label_accuracy(
    model: torch.nn.Module,
    rows: Sequence[Row],
    answers: Sequence[str],
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    dtype: torch.dtype,
    progress: Callable[[int], None] = lambda done: None,
    rows_at_most: int = ROWS_A_PASS,
) -> LabelAccuracy:
    """Ask the model each row and count the right answers, free and restricted to the set.

    Args: as `label_answers`.
    """
    found = label_answers(model, rows, answers, tokenizer, template, dtype, progress, rows_at_most)
    free, restricted = sum(each.free for each in found), sum(each.restricted for each in found)
    return LabelAccuracy(len(found), free / len(found), restricted / len(found))


def label_answers(
    model: torch.nn.Module,
    rows: Sequence[Row],
    answers: Sequence[str],
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    dtype: torch.dtype,
    progress: Callable[[int], None] = lambda done: None,
    rows_at_most: int = ROWS_A_PASS,
    tokens_at_most: int | None = None,
) -> list[LabelAnswer]:
    """Ask the model each row and say which answers are right, free and restricted to the set.

    Args:
        model: a causal language model of transformers, on its device.
        rows: held-out rows, each one answer at the end.
        answers: the set of answers.
        tokenizer: the model's.
        template: the model's.
        dtype: of the matrix products.
        progress: told after each batch how many rows are done.
        rows_at_most: in one pass.
        tokens_at_most: in one pass; None for no limit.
    """
    asked = questions(rows, tokenizer, template)
    choices = answer_tokens(rows[0], answers, tokenizer, template)
    at_most = max(map(len, choices)) + 1

    def answered(prefix: Prefix, batch: Sequence[Question]) -> list[LabelAnswer]:
        best = _likeliest(model, prefix, choices)
        said = generated(model, prefix, tokenizer.eos_token_ids, at_most)
        return [
            LabelAnswer(
                free=_same(tokenizer.decode(ids, skip_special_tokens=True), question.answer),
                restricted=answers[index].strip() == question.answer,
            )
            for question, index, ids in zip(batch, best, said, strict=True)
        ]

    lengths = [len(each.prompt) + at_most for each in asked]
    tokens = tokens_at_most or sum(lengths)
    made = batches(lengths, rows_at_most, tokens)
    return _asked(model, asked, tokenizer.pad_token_id, dtype, made, answered, progress)


def restricted_answers(
    model: torch.nn.Module,
    rows: Sequence[Row],
    answers: Sequence[str],
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    dtype: torch.dtype,
) -> list[bool]:
    """Ask the model each row and say which answers are right, restricted to the set.

    What the model would say freely is not generated.

    Args: as `label_answers`.
    """
    asked = questions(rows, tokenizer, template)
    choices = answer_tokens(rows[0], answers, tokenizer, template)

    def answered(prefix: Prefix, batch: Sequence[Question]) -> list[bool]:
        best = _likeliest(model, prefix, choices)
        return [
            answers[index].strip() == question.answer
            for question, index in zip(batch, best, strict=True)
        ]

    lengths = [len(each.prompt) for each in asked]
    made = batches(lengths, ROWS_A_PASS, sum(lengths))
    return _asked(model, asked, tokenizer.pad_token_id, dtype, made, answered)


def _asked(
    model: torch.nn.Module,
    asked: Sequence[Question],
    pad: int,
    dtype: torch.dtype,
    made: Sequence[list[int]],
    answered: Callable[[Prefix, Sequence[Question]], list[T]],
    progress: Callable[[int], None] = lambda done: None,
) -> list[T]:
    """Return what `answered` finds of each question; `made` says which share a pass."""
    import torch

    device = next(model.parameters()).device

    prompts = [each.prompt for each in asked]
    start: list[Prefix | None] = []

    def work(places: list[int]) -> list[T]:
        batch = [asked[place] for place in places]
        with torch.inference_mode(), compute_in(model, device.type, dtype):
            if not start:
                start.append(read_shared(model, prompts))
            prefix = read(model, [prompts[place] for place in places], pad, start[0])
            return answered(prefix, batch)

    found: dict[int, T] = {}
    training = model.training
    model.eval()
    try:
        for places, results in in_passes(device, made, work):
            found |= zip(places, results, strict=True)
            progress(len(found))
    finally:
        model.train(training)
    return [found[place] for place in range(len(asked))]


def _same(said: str, answer: str) -> bool:
    return said.strip().casefold() == answer.casefold()
