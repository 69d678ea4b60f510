"""What the objectives over preferences share: which rows they take, and how they are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mst.data.encode import Example
from mst.data.rows import Row
from mst.objective import label_count

if TYPE_CHECKING:
    import torch


def lacks_pair(task: str) -> Callable[[Row], str]:
    """Return what a row lacks to be a preference, as `Objective.lacks`."""

    def lacks(row: Row) -> str:
        if row.rejected and row.messages:
            return ""
        other = "kto" if row.desirable is not None else "sft"
        if not row.messages:
            other = "pt"
        return (
            f"has no worse answer to compare with, which {task} needs: give each row a better and"
            f" a worse one (docs/data.md has the shapes), or pass --task {other}"
        )

    return lacks


def both(example: Example) -> tuple[Example, ...]:
    """Return the better sequence and the worse one."""
    assert example.rejected is not None
    return example, example.rejected


def differ(example: Example) -> bool:
    """Return whether the pair's sequences differ, and both have something that is compared."""
    other = example.rejected
    if other is None or example.input_ids == other.input_ids:
        return False
    return label_count(example) > 0 and label_count(other) > 0


def differ_at_all(example: Example) -> bool:
    """Return whether the pair's sequences differ."""
    return example.rejected is not None and example.input_ids != example.rejected.input_ids


def count_pairs(example: Example) -> Mapping[str, float]:
    """Return what a preference adds to the totals."""
    return {"pairs": 1.0}


def preferred(
    chosen: torch.Tensor, rejected: torch.Tensor, pairs: float
) -> dict[str, torch.Tensor]:
    """Return a micro-batch's part of what all preference objectives measure.

    Args:
        chosen: (pairs,) rewards of the better answers.
        rejected: (pairs,) of the worse ones.
        pairs: of the global batch.
    """
    better, worse = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": better.sum() / pairs,
        "rewards/rejected": worse.sum() / pairs,
        "rewards/accuracies": (better > worse).sum() / pairs,
        "rewards/margins": (better - worse).sum() / pairs,
    }


def log_probabilities(
    chosen: torch.Tensor, rejected: torch.Tensor, pairs: float
) -> dict[str, torch.Tensor]:
    """Return a micro-batch's part of the mean log-probabilities of the answers."""
    return {
        "logps/chosen": chosen.detach().sum() / pairs,
        "logps/rejected": rejected.detach().sum() / pairs,
    }
