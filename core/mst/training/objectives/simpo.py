"""`simpo`: preferences by mean log-probabilities and a margin, without a reference."""

from __future__ import annotations

from functools import partial

from mst.objective import Micro, Objective, Part, sequence_means
from mst.request import TrainRequest
from mst.training.objectives.dpo import preference_loss
from mst.training.objectives.pairs import (
    both,
    count_pairs,
    differ,
    lacks_pair,
    log_probabilities,
    preferred,
)

BETA = 2.0


def make(request: TrainRequest) -> Objective:
    """Return the objective."""
    return Objective(
        name=request.task,
        lacks=lacks_pair("simpo"),
        counts=count_pairs,
        loss=partial(
            _loss,
            beta=BETA if request.beta is None else request.beta,
            gamma=request.simpo_gamma,
            smoothing=request.label_smoothing,
        ),
        sequences=both,
        usable=differ,
    )


def _loss(micro: Micro, *, beta: float, gamma: float, smoothing: float) -> Part:
    """Return the part of the loss.

    Source: Meng et al. 2024, "SimPO", equation 6; smoothed as dpo is.
    """
    pairs = micro.totals["pairs"]
    means = sequence_means(micro.policy)
    chosen, rejected = means[0::2], means[1::2]
    losses = preference_loss(beta * (chosen - rejected) - gamma, "sigmoid", smoothing)
    metrics = preferred(beta * chosen, beta * rejected, pairs)
    metrics |= log_probabilities(chosen, rejected, pairs)
    return Part(losses.sum() / pairs, metrics)
