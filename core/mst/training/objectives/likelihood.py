"""`sft` and `pt`: the likelihood of the labelled tokens."""

from __future__ import annotations

from collections.abc import Mapping

from mst.data.encode import Example
from mst.data.rows import Row
from mst.objective import Micro, Objective, Part, label_count
from mst.request import TrainRequest


def make(request: TrainRequest) -> Objective:
    """Return the objective; both have one loss and differ in the rows they take."""
    plain = request.task == "pt"
    return Objective(
        name=request.task,
        lacks=_lacks_text if plain else _lacks_answer,
        counts=_counts,
        loss=negative_log_likelihood,
        train_on="all" if plain else None,
    )


def _lacks_answer(row: Row) -> str:
    if row.rejected:
        return (
            "is a preference, of which sft would not see the worse answer: pass --task dpo, orpo,"
            " simpo or rm, or leave the worse answers out of the file"
        )
    if row.desirable is not None:
        return "says whether its answer is desirable, which sft would not see: pass --task kto"
    if not row.messages:
        return "is plain text without an answer: pass --task pt"
    return ""


def _lacks_text(row: Row) -> str:
    if row.rejected or row.desirable is not None:
        return "is a preference, which pt would not see: pass --task dpo, orpo, simpo, rm or kto"
    return ""


def _counts(example: Example) -> Mapping[str, float]:
    return {"tokens": float(label_count(example))}


def negative_log_likelihood(micro: Micro) -> Part:
    """Return the cross-entropy of the label tokens, each times its weight, over their number.

    A weight does not change the number, so that a token of weight 2 pulls twice as hard as one of
    weight 1 whatever else is in the batch.
    """
    total = (micro.policy.log_probs * micro.policy.weights).sum()
    return Part(-total / micro.totals["tokens"])
