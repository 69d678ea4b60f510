"""`rm`: a reward model, which gives a conversation a score."""

from __future__ import annotations

from mst.objective import Micro, Objective, Part
from mst.request import TrainRequest
from mst.training.objectives.pairs import both, count_pairs, differ_at_all, lacks_pair, preferred


def make(request: TrainRequest) -> Objective:
    """Return the objective."""
    return Objective(
        name=request.task,
        lacks=lacks_pair("rm"),
        counts=count_pairs,
        loss=_loss,
        sequences=both,
        usable=differ_at_all,
        scores=True,
    )


def _loss(micro: Micro) -> Part:
    """Return the part of the loss.

    Source: Ouyang et al. 2022, "Training language models to follow instructions", equation 1: the
    likelihood of the comparison under Bradley and Terry's model.
    """
    import torch.nn.functional as functional

    assert micro.policy.scores is not None
    pairs = micro.totals["pairs"]
    chosen, rejected = micro.policy.scores[0::2], micro.policy.scores[1::2]
    loss = -functional.logsigmoid(chosen - rejected).sum() / pairs
    return Part(loss, preferred(chosen, rejected, pairs))
