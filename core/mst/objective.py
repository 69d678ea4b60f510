"""What a model is trained for: the types that built-in objectives and plugins are made of.

An objective says which rows it needs, which sequences of a row the model reads, and what the loss
of a micro-batch is. Loss and metrics are parts of the global batch's: what counts them (pairs,
label tokens) is summed over the whole batch before the first pass, so that nothing depends on how
the batch was cut into micro-batches and over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mst.configuration import ObjectiveWork
from mst.data.encode import IGNORE, Example
from mst.data.rows import Row

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scored:
    """What a model says of a micro-batch's sequences, a row each, in their order.

    Attributes:
        log_probs: (sequences, targets) float32, the log-probability of each token with a label,
            from the left; 0 where a sequence has no more of them.
        weights: (sequences, targets) float32, the factor of each; 0 where there is none.
        lengths: (sequences,) float32, how many have a weight above 0.
        scores: (sequences,) float32, what a reward model says; None of a language model.
    """

    log_probs: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor
    scores: torch.Tensor | None = None


@dataclass(frozen=True)
class Micro:
    """A micro-batch that has passed through the model.

    Attributes:
        examples: its rows.
        policy: what the model says of their sequences, first those of the first row.
        reference: what it said before training; None when the objective needs none.
        totals: the global batch's counts, and what `Objective.before` found, over all ranks.
    """

    examples: Sequence[Example] = field(repr=False)
    policy: Scored
    reference: Scored | None
    totals: Mapping[str, float]


@dataclass(frozen=True)
class Part:
    """A micro-batch's part of the global batch's loss and metrics: all parts are added up.

    Attributes:
        loss: scalar, to be differentiated.
        metrics: name to scalar without gradient. All parts of a global batch have the same names;
            which, may depend on its totals.
    """

    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Draw:
    """An answer that is to be sampled.

    Attributes:
        prompt: token ids up to where the model answers.
        seed: draws with the same one are the same, whatever else is sampled beside it.
    """

    prompt: Sequence[int] = field(repr=False)
    seed: str


@dataclass(frozen=True)
class Answer:
    """An answer that was sampled.

    Attributes:
        tokens: its ids, with that of the token with which the model stopped.
        cut: it did not stop within as many tokens as there may be.
    """

    tokens: Sequence[int] = field(repr=False)
    cut: bool


@dataclass(frozen=True)
class Passes:
    """What an objective can ask of the model before the step's gradients.

    Attributes:
        model: as it is being trained; call it in no other way than by the functions here unless
            the objective refuses ZeRO.
        score: what the model, and the model before training, say of sequences; no gradient.
        sample: answers of at most `Objective.samples` tokens, drawn at its temperature.
        text: of token ids, without special tokens.
        step: optimizer steps taken before; 0 on held-out rows.
    """

    model: torch.nn.Module
    score: Callable[[Sequence[Example]], tuple[Scored, Scored | None]]
    sample: Callable[[Sequence[Draw]], list[Answer]]
    text: Callable[[Sequence[int]], str]
    step: int


@dataclass(frozen=True)
class Prelude:
    """What `Objective.before` found for a micro-batch.

    Attributes:
        examples: what the gradient pass takes for the micro-batch.
        sums: name to value, the same names for every micro-batch; summed over all micro-batches
            and ranks into `Micro.totals`.
    """

    examples: Sequence[Example] = field(repr=False)
    sums: Mapping[str, float]


def alone(example: Example) -> tuple[Example, ...]:
    """Return the row's one sequence."""
    return (example,)


def always(example: Example) -> bool:
    """Return True: there is something to learn from every row."""
    return True


@dataclass(frozen=True)
class Objective:
    """What a model is trained for.

    Attributes:
        name: as `--task` names it.
        lacks: what a row lacks to be of use, and what would do, as the end of a sentence that
            begins with "the row"; "" when it lacks nothing. It never quotes the row.
        counts: what an encoded row adds to the totals that loss and metrics are divided by.
        loss: a micro-batch's part of the global batch's loss and metrics.
        sequences: what the model reads of a row.
        usable: whether there is something to learn from an encoded row; others are left out.
        before: called for each micro-batch before the step's gradients, with the rows of the
            global batch, the places of the micro-batch's among them, and the passes; it draws no
            random numbers but torch's. None where there is nothing to do.
        reference: the loss needs what the model said before training.
        passes: forward passes a row that `before` makes, for the forecast of time.
        train_on: which turns have labels, whatever `--train-on` says.
        scores: the model gives a sequence a score instead of its tokens a probability.
        samples: longest answer in tokens that `before` samples, for each of `sequences`; 0 where it
            samples none.
        temperature: what logits are divided by, where answers are sampled and in all passes.
        goal: metric of the held-out rows whose highest value is the best; the lowest loss where
            it is "".
    """

    name: str
    lacks: Callable[[Row], str]
    counts: Callable[[Example], Mapping[str, float]]
    loss: Callable[[Micro], Part]
    sequences: Callable[[Example], tuple[Example, ...]] = alone
    usable: Callable[[Example], bool] = always
    before: Callable[[Sequence[Example], Sequence[int], Passes], Prelude] | None = None
    reference: bool = False
    passes: int = 0
    train_on: str | None = None
    scores: bool = False
    samples: int = 0
    temperature: float = 1.0
    goal: str = ""


def objective_work(objective: Objective) -> ObjectiveWork:
    """Return what the planner needs to know of an objective."""
    return ObjectiveWork(objective.reference, objective.passes, objective.scores, objective.samples)


def label_count(example: Example) -> int:
    """Return how many tokens of an encoded sequence have a label."""
    return len(example.labels) - example.labels.count(IGNORE)


def totals(objective: Objective, examples: Sequence[Example]) -> dict[str, float]:
    """Return the counts of all rows of a global batch."""
    found: dict[str, float] = {}
    for each in examples:
        for name, value in objective.counts(each).items():
            found[name] = found.get(name, 0.0) + value
    return found


def sequence_sums(scored: Scored) -> torch.Tensor:
    """Return the log-probability of each sequence's labelled tokens, each times its weight."""
    return (scored.log_probs * scored.weights).sum(-1)


def sequence_means(scored: Scored) -> torch.Tensor:
    """Return `sequence_sums` over the number of tokens that count; 0 for a sequence with none."""
    return sequence_sums(scored) / scored.lengths.clamp(min=1)
