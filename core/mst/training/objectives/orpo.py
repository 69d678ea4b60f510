"""`orpo`: likelihood and odds ratio at once, without a reference."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mst.data.encode import IGNORE, Example
from mst.objective import Micro, Objective, Part, sequence_means
from mst.request import TrainRequest
from mst.training.objectives.pairs import (
    count_pairs,
    differ,
    lacks_pair,
    log_probabilities,
    preferred,
)

if TYPE_CHECKING:
    import torch

BETA = 0.1


def make(request: TrainRequest) -> Objective:
    """Return the objective."""
    return Objective(
        name=request.task,
        lacks=lacks_pair("orpo"),
        counts=_counts,
        loss=partial(_loss, beta=BETA if request.beta is None else request.beta),
        sequences=_sequences,
        usable=differ,
    )


def _sequences(example: Example) -> tuple[Example, ...]:
    """Return the pair; of the better one the prompt has labels too, of weight 0.

    The likelihood is that of the whole text (as in the authors' code), the odds ratio that of the
    answers.
    """
    assert example.rejected is not None
    ids = example.input_ids
    own = example.weights or array("f", [1.0]) * len(ids)
    answer = zip(own, example.labels, strict=True)
    weights = array("f", [0.0 if label == IGNORE else weight for weight, label in answer])
    labels = array("i", [IGNORE]) + ids[1:]
    return replace(example, labels=labels, weights=weights), example.rejected


def _counts(example: Example) -> Mapping[str, float]:
    return {**count_pairs(example), "tokens": float(len(example.input_ids) - 1)}


def _loss(micro: Micro, *, beta: float) -> Part:
    """Return the part of the loss.

    Source: Hong et al. 2024, "ORPO", equations 6 and 7, with mean log-probabilities of the
    answers.
    """
    import torch.nn.functional as functional

    pairs = micro.totals["pairs"]
    means = sequence_means(micro.policy)
    chosen, rejected = means[0::2], means[1::2]
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    likelihood = micro.policy.log_probs[0::2].sum() / micro.totals["tokens"]
    ratio = functional.logsigmoid(log_odds)
    metrics = preferred(beta * chosen, beta * rejected, pairs)
    metrics |= log_probabilities(chosen, rejected, pairs) | {
        "nll_loss": -likelihood.detach(),
        "log_odds_ratio": ratio.detach().sum() / pairs,
        "log_odds_chosen": log_odds.detach().sum() / pairs,
    }
    return Part(-likelihood - beta * ratio.sum() / pairs, metrics)


def _log1mexp(values: torch.Tensor) -> torch.Tensor:
    """Return log(1 - exp(x)) of negative values.

    Source: Maechler 2012, "Accurately Computing log(1 - exp(-|a|))", equation 7.
    """
    import torch

    small = torch.log(-torch.expm1(values))
    return torch.where(values < -0.6931471805599453, torch.log1p(-torch.exp(values)), small)
