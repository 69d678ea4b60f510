"""Two benches of the same cells: what got slower, larger or worse by more than the noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mst.bench.figures import over_repeats, peak_memory, tokens_per_second
from mst.bench.results import DONE, FORECAST, Measured, Repeat, Results
from mst.quantities import gib

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A change smaller than this is of no interest, however sure it is.
TOLERANCE = 0.03
MEMORY_TOLERANCE = 0.05
# Of a loss after as many steps from the same seed: other kernels round otherwise.
LOSS_TOLERANCE = 0.02
_DRAWS = 2000
_SIDE = 0.025
# The same draws every time, so that a comparison says the same every time.
_SEED = 20261127


@dataclass(frozen=True)
class Change:
    """A figure of a cell, before and after.

    Attributes:
        cell: the newer one.
        figure: its name.
        old, new: in words.
        ratio: new over old.
        low, high: between which the ratio lies with 95 % confidence; equal where nothing was drawn.
        worse: beyond the tolerance and the noise.
        note: why it may not be told.
    """

    cell: Measured
    figure: str
    old: str
    new: str
    ratio: float
    low: float
    high: float
    worse: bool
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All changes, and the cells that only one of the two has."""

    changes: tuple[Change, ...]
    only_old: tuple[Measured, ...]
    only_new: tuple[Measured, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """The changes for the worse."""
        return tuple(each for each in self.changes if each.worse)


def compare(old: Results, new: Results, tolerance: float = TOLERANCE) -> Comparison:
    """Return how cells differ that both have on the same kind of chip.

    Args:
        old: measured before.
        new: measured after.
        tolerance: share of speed whose loss is of no interest.
    """
    before, after = _by_chip(old), _by_chip(new)
    changes: list[Change] = []
    for key, each in after.items():
        if key in before:
            changes += _changes(before[key], each, tolerance)
    return Comparison(
        tuple(changes),
        tuple(each for key, each in before.items() if key not in after),
        tuple(each for key, each in after.items() if key not in before),
    )


def _by_chip(results: Results) -> dict[tuple[str, str], Measured]:
    found: dict[tuple[str, str], Measured] = {}
    for each in results.cells:
        if each.status != FORECAST:
            found.setdefault((each.id, each.machine.chip if each.machine else ""), each)
    return found


def _changes(old: Measured, new: Measured, tolerance: float) -> list[Change]:
    if DONE not in (old.status, new.status):
        return []
    if old.status != new.status:
        # What could be measured and can't be any longer is worse, whatever it is.
        return [Change(new, "status", old.status, new.status, 1, 1, 1, new.status != DONE)]
    return [_speed(old, new, tolerance), _memory(old, new), *_losses(old, new)]


def _speed(old: Measured, new: Measured, tolerance: float) -> Change:
    before, after = tokens_per_second(old), tokens_per_second(new)
    assert before is not None
    assert after is not None
    low, high = ratio_interval(old.repeats, new.repeats)
    few = min(before.count, after.count)
    note = "one repeat each: what differs from run to run is not known" if few == 1 else ""
    return Change(
        new,
        "tokens/s",
        f"{before.median:.4g}",
        f"{after.median:.4g}",
        after.median / before.median,
        low,
        high,
        high < 1 - tolerance,
        note,
    )


def ratio_interval(
    old: Sequence[Repeat], new: Sequence[Repeat], draws: int = _DRAWS
) -> tuple[float, float]:
    """Return between which the ratio of two speeds lies with 95 % confidence.

    Repeats are drawn with replacement, and steps within each; the same every time.

    Source: Davison and Hinkley 1997, "Bootstrap Methods and their Application", section 3.8
    (hierarchical data) and 5.3 (percentile limits).
    """
    import numpy as np

    dice = np.random.default_rng(_SEED)
    ratios = _drawn(new, draws, dice) / _drawn(old, draws, dice)
    low, high = np.quantile(ratios, (_SIDE, 1 - _SIDE))
    return float(low), float(high)


def _drawn(repeats: Sequence[Repeat], draws: int, dice: np.random.Generator) -> NDArray[np.float64]:
    """Return the median speeds of repeats drawn anew, (draws,)."""
    import numpy as np

    count = len(repeats)
    # (repeats, draws, places): each repeat's speed with steps of its own in each place.
    speeds = []
    for one in repeats:
        steps = np.asarray(one.step_seconds)
        chosen = dice.integers(0, len(steps), (draws, count, len(steps)))
        speeds.append(one.tokens / steps[chosen].sum(axis=-1))
    taken = dice.integers(0, count, (draws, count))
    rows, places = np.arange(draws)[:, None], np.arange(count)[None, :]
    found: NDArray[np.float64] = np.median(np.stack(speeds)[taken, rows, places], axis=1)
    return found


def _memory(old: Measured, new: Measured) -> Change:
    before, after = peak_memory(old), peak_memory(new)
    assert before is not None
    assert after is not None
    ratio = after.median / max(1.0, before.median)
    worse = after.low > before.high * (1 + MEMORY_TOLERANCE)
    return Change(new, "memory", gib(before.median), gib(after.median), ratio, ratio, ratio, worse)


def _losses(old: Measured, new: Measured) -> Iterable[Change]:
    """Yield the held-out loss, or the last step's where nothing is held out."""
    for name, value in (("eval loss", _eval_loss), ("loss", _loss)):
        before, after = over_repeats(old, value), over_repeats(new, value)
        if before is None or after is None:
            continue
        ratio = after.median / before.median if before.median else 1.0
        # A loss that is no number any longer is above every other.
        worse = not after.low <= before.high * (1 + LOSS_TOLERANCE) and math.isfinite(before.high)
        yield Change(
            new, name, f"{before.median:.4f}", f"{after.median:.4f}", ratio, ratio, ratio, worse
        )
        return


def _eval_loss(one: Repeat) -> float | None:
    return one.eval_loss


def _loss(one: Repeat) -> float | None:
    return one.loss
