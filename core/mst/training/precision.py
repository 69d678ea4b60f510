"""Loss scaling: what float16 needs so that small gradients don't become zero.

Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2; the numbers are those of
torch.amp.GradScaler. Unlike there, a step whose gradients overflowed is taken again with a smaller
scale, so that no row is passed over. All scales are powers of two: scaling rounds nothing.
"""

from __future__ import annotations

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000


def first_scale(compute_dtype: str) -> float:
    """Return the factor that the loss of a first step is multiplied by: 1 but for float16."""
    return FIRST_SCALE if compute_dtype == "float16" else 1.0


def after_overflow(scale: float) -> float | None:
    """Return the next scale to try, or None when it isn't the scale that is at fault."""
    return scale / 2 if scale > 1 else None


def after_good_step(scale: float, good_steps: int, compute_dtype: str) -> tuple[float, int]:
    """Return the scale and the number of good steps in a row after another one.

    Args:
        scale: of the step that went well.
        good_steps: in a row, before it.
        compute_dtype: only float16 scales.
    """
    if compute_dtype != "float16":
        return scale, 0
    if good_steps + 1 == GROWTH_STEPS:
        return scale * 2, 0
    return scale, good_steps + 1
