"""`kto`: answers that are desirable or not, one by one, against the model before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from mst.data.encode import IGNORE, Example
from mst.data.rows import Row
from mst.errors import UsageError
from mst.objective import (
    Micro,
    Objective,
    Part,
    Passes,
    Prelude,
    label_count,
    sequence_sums,
)
from mst.request import TrainRequest

BETA = 0.1


def make(request: TrainRequest) -> Objective:
    """Return the objective.

    Raises:
        UsageError: a step would have one row, whose answer meets no other prompt.
    """
    if request.per_device_train_batch_size == 1 and request.gradient_accumulation_steps == 1:
        ranks = (request.nproc_per_node or 1) * request.nnodes
        if ranks == 1:
            raise UsageError(
                "kto was asked for with one row a step; it measures how far the model has moved on"
                " the answers of a step's other rows. Pass --gradient-accumulation-steps 4 or more."
            )
    return Objective(
        name=request.task,
        lacks=_lacks,
        counts=_counts,
        loss=partial(
            _loss,
            beta=BETA if request.beta is None else request.beta,
            weights=(request.desirable_weight, request.undesirable_weight),
        ),
        usable=lambda example: label_count(example) > 0,
        before=partial(_before, max_length=request.max_length),
        reference=True,
        passes=1,
    )


def _lacks(row: Row) -> str:
    if row.rejected:
        return "is a preference, and kto takes single answers: pass --task dpo"
    if row.desirable is None:
        return (
            "does not say whether its answer is desirable: give it a `label` of true or false, or"
            " pass --task sft"
        )
    return ""


def _counts(example: Example) -> Mapping[str, float]:
    good = float(bool(example.row.desirable))
    return {"rows": 1.0, "desirable": good, "undesirable": 1.0 - good}


def mismatched(prompt: Example, answer: Example, max_length: int | None) -> Example:
    """Return one row's prompt with another's answer, cut at `max_length`."""
    asked, said = _answer_begins(prompt), _answer_begins(answer)
    ids = (prompt.input_ids[:asked] + answer.input_ids[said:])[:max_length]
    labels = (prompt.labels[:asked] + answer.labels[said:])[:max_length]
    return Example(ids, labels, prompt.row)


def _answer_begins(example: Example) -> int:
    return next(i for i, label in enumerate(example.labels) if label != IGNORE)


def _before(
    step: Sequence[Example], places: Sequence[int], passes: Passes, *, max_length: int | None
) -> Prelude:
    """Sum up how much likelier the model now finds answers that belong to other prompts.

    Each prompt takes the answer of the row before it in the global batch; TRL takes that of the
    row before it in the micro-batch, and so depends on its size.

    Source: Ethayarajh et al. 2024, "KTO", section 4.1, "KL estimate".
    """
    pairs = [mismatched(step[i], step[i - 1], max_length) for i in places]
    policy, reference = passes.score(pairs)
    assert reference is not None
    moved = sequence_sums(policy) - sequence_sums(reference)
    return Prelude([step[i] for i in places], {"kl": float(moved.sum())})


def _loss(micro: Micro, *, beta: float, weights: tuple[float, float]) -> Part:
    """Return the part of the loss.

    Source: Ethayarajh et al. 2024, "KTO", equations 7 and 8.
    """
    import torch

    assert micro.reference is not None
    totals = micro.totals
    policy = sequence_sums(micro.policy)
    ratios = policy - sequence_sums(micro.reference)
    kl = max(0.0, totals["kl"] / totals["rows"])
    good = torch.tensor([bool(each.row.desirable) for each in micro.examples], device=policy.device)
    sign = torch.where(good, 1.0, -1.0)
    factor = torch.where(good, weights[0], weights[1])
    losses = factor * (1 - torch.sigmoid(sign * beta * (ratios - kl)))
    metrics = {"kl": policy.new_tensor(kl * len(micro.examples) / totals["rows"])}
    rewards = beta * ratios.detach()
    for kind, chosen, total in (
        ("chosen", good, totals["desirable"]),
        ("rejected", ~good, totals["undesirable"]),
    ):
        if total:
            metrics[f"rewards/{kind}"] = (rewards * chosen).sum() / total
            metrics[f"logps/{kind}"] = (policy.detach() * chosen).sum() / total
    if totals["desirable"] and totals["undesirable"]:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return Part(losses.sum() / totals["rows"], metrics)
