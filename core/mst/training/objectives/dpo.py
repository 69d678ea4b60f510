"""`dpo`: direct preference optimization, against the model as it was before training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from mst.data.encode import Example
from mst.errors import UsageError
from mst.objective import (
    Micro,
    Objective,
    Part,
    label_count,
    sequence_sums,
)
from mst.request import TrainRequest
from mst.training.objectives.pairs import (
    both,
    count_pairs,
    differ,
    lacks_pair,
    log_probabilities,
    preferred,
)

if TYPE_CHECKING:
    import torch

BETA = 0.1
LOSS_TYPES = ("sigmoid", "hinge", "ipo")


def make(request: TrainRequest) -> Objective:
    """Return the objective.

    Raises:
        UsageError: there is no such `loss_type`, or it takes no label smoothing.
    """
    kind = request.loss_type or LOSS_TYPES[0]
    if kind not in LOSS_TYPES:
        raise UsageError(
            f"--loss-type {kind} was asked for; dpo has {', '.join(LOSS_TYPES)}. Pass one of these."
        )
    if request.label_smoothing and kind != "sigmoid":
        raise UsageError(
            f"--label-smoothing {request.label_smoothing:g} was given with --loss-type {kind}; only"
            " sigmoid has it. Leave it out, or pass --loss-type sigmoid."
        )
    return Objective(
        name=request.task,
        lacks=lacks_pair("dpo"),
        counts=partial(_counts, rpo_alpha=request.rpo_alpha),
        loss=partial(
            _loss,
            beta=BETA if request.beta is None else request.beta,
            kind=kind,
            smoothing=request.label_smoothing,
            rpo_alpha=request.rpo_alpha,
        ),
        sequences=both,
        usable=differ,
        reference=True,
    )


def _counts(example: Example, rpo_alpha: float) -> Mapping[str, float]:
    chosen = {"chosen tokens": float(label_count(example))} if rpo_alpha else {}
    return {**count_pairs(example), **chosen}


def _loss(micro: Micro, *, beta: float, kind: str, smoothing: float, rpo_alpha: float) -> Part:
    """Return the part of the loss that the formulas of docs/objectives.md give.

    Source: sigmoid: Rafailov et al. 2023, "Direct Preference Optimization", equation 7, smoothed
    as Mitchell 2023, "A note on DPO with noisy preferences", equation 3; hinge: Zhao et al. 2023,
    "SLiC-HF", equation 2; ipo: Azar et al. 2023, "A General Theoretical Paradigm", equation 17,
    over mean log-probabilities as its authors told TRL; the likelihood of the better answer:
    Pang et al. 2024, "Iterative Reasoning Preference Optimization", equation 1.
    """
    assert micro.reference is not None
    pairs = micro.totals["pairs"]
    policy, reference = sequence_sums(micro.policy), sequence_sums(micro.reference)
    ratios = policy - reference
    chosen, rejected = ratios[0::2], ratios[1::2]
    if kind == "ipo":
        means = ratios / micro.policy.lengths.clamp(min=1)
        losses = (means[0::2] - means[1::2] - 1 / (2 * beta)) ** 2
    else:
        losses = preference_loss(beta * (chosen - rejected), kind, smoothing)
    loss = losses.sum() / pairs
    if rpo_alpha:
        likelihood = micro.policy.log_probs[0::2] * micro.policy.weights[0::2]
        loss = loss - rpo_alpha * likelihood.sum() / micro.totals["chosen tokens"]
    metrics = preferred(beta * chosen, beta * rejected, pairs)
    return Part(loss, metrics | log_probabilities(policy[0::2], policy[1::2], pairs))


def preference_loss(margins: torch.Tensor, kind: str, smoothing: float) -> torch.Tensor:
    """Return the loss of each margin between a better and a worse answer.

    Args:
        margins: of the rewards.
        kind: "sigmoid" or "hinge".
        smoothing: share of the pairs that are taken to be the wrong way round.
    """
    import torch.nn.functional as functional

    if kind == "hinge":
        return functional.relu(1 - margins)
    right, wrong = -functional.logsigmoid(margins), -functional.logsigmoid(-margins)
    return right * (1 - smoothing) + wrong * smoothing
