"""The learning rate as a pure function of the step, so that resume needs no scheduler state."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, kind: str) -> float:
    """Return what the peak learning rate is multiplied by at optimizer step `step` (from 0).

    Args:
        step: the step about to be taken.
        total_steps: steps of the whole run.
        warmup_steps: steps of linear rise from 0.
        kind: "cosine" (half a period, to 0), "linear" (to 0) or "constant".

    Source: the formulas of transformers.optimization, which the tests compare with.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if kind == "linear":
        return max(0.0, 1.0 - progress)
    return 1.0


def warmup_steps(total_steps: int, ratio: float) -> int:
    """Return the number of warm-up steps: the share rounded up, as transformers does."""
    return math.ceil(total_steps * ratio)
