"""A figure of a model: sums over its rows, from which its value and its interval are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

RESAMPLES = 2000
# Percentiles of the 95 % interval.
_EDGES = (2.5, 97.5)
# Resamples that are drawn at once: a matrix of them for 100,000 rows takes 40 MB.
_AT_ONCE = 50


@dataclass(frozen=True)
class Statistic:
    """What a metric has found in each row, and what it makes of the rows together.

    Attributes:
        name: of the figure.
        rows: one tuple of numbers a row, whose sums over rows `value` takes; None for a figure
            that can't be taken apart, which has no interval.
        value: the figure, of the sums; NaN where they don't make one.
        higher_is_better: which way is better.
        whole: the figure, where `rows` is None.
    """

    name: str
    rows: tuple[tuple[float, ...], ...] | None = field(repr=False)
    value: Callable[[Sequence[float]], float] = field(repr=False)
    higher_is_better: bool = True
    whole: float = math.nan


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval; beside another model's, where one was compared.

    Attributes:
        name: as the metric gives it.
        value: over all rows.
        interval: of the value; None where rows can't be drawn again.
        higher_is_better: which way is better.
        rows: over which it was computed.
        before: the other model's value on the same rows.
        before_interval: of that.
        difference: value less `before`.
        difference_interval: of the difference, over the same draws of rows for both models.
        verdict: "better", "worse" or "no difference shown"; None without a difference's interval.
    """

    name: str
    value: float | None
    interval: tuple[float, float] | None
    higher_is_better: bool
    rows: int
    before: float | None = None
    before_interval: tuple[float, float] | None = None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    verdict: str | None = None


def mean_of(
    name: str, values: Sequence[float], higher_is_better: bool = True, scale: float = 1.0
) -> Statistic:
    """Return the mean over rows as a statistic.

    Args:
        name: of the figure.
        values: one a row.
        higher_is_better: which way is better.
        scale: factor of the mean.
    """
    rows = tuple((float(each), 1.0) for each in values)
    return Statistic(name, rows, lambda sums: _ratio(sums) * scale, higher_is_better)


def ratio_of(
    name: str, parts: Sequence[tuple[float, float]], higher_is_better: bool = True
) -> Statistic:
    """Return the ratio of two sums over rows as a statistic, such as loss over tokens."""
    return Statistic(name, tuple(parts), _ratio, higher_is_better)


def _ratio(sums: Sequence[float]) -> float:
    return sums[0] / sums[1] if sums[1] else math.nan


def figure(
    found: Statistic, before: Statistic | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> Figure:
    """Return a statistic's figure, with intervals by the (paired) bootstrap over rows.

    Args:
        found: of the model.
        before: of the model that it is compared with, on the same rows.
        seed: of the draws.
        resamples: how many times rows are drawn.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", 13.3 (percentile
    interval); Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation",
    section 4 (paired).
    """
    value, draws = _drawn(found, seed, resamples)
    plain = Figure(
        name=found.name,
        value=_number(value),
        interval=_interval(draws),
        higher_is_better=found.higher_is_better,
        rows=len(found.rows) if found.rows is not None else 0,
    )
    if before is None:
        return plain
    other, other_draws = _drawn(before, seed, resamples)
    paired = None if draws is None or other_draws is None else draws - other_draws
    interval = _interval(paired)
    return Figure(
        **_fields(plain),
        before=_number(other),
        before_interval=_interval(other_draws),
        difference=_number(value - other),
        difference_interval=interval,
        verdict=None if interval is None else _verdict(interval, found.higher_is_better),
    )


def _fields(plain: Figure) -> dict[str, Any]:
    names = ("name", "value", "interval", "higher_is_better", "rows")
    return {name: getattr(plain, name) for name in names}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _drawn(
    found: Statistic, seed: int, resamples: int
) -> tuple[float, numpy.ndarray[Any, Any] | None]:
    """Return the figure over all rows, and over each draw of as many rows with replacement.

    The draws depend on the seed and the number of rows alone, so those of two models pair.
    """
    import numpy

    if found.rows is None:
        return found.whole, None
    matrix = numpy.array(found.rows, dtype=float)
    value = found.value(matrix.sum(0).tolist())
    rows = len(matrix)
    if rows < 2:
        return value, None
    generator = numpy.random.default_rng(seed)
    even = numpy.full(rows, 1 / rows)
    values: list[float] = []
    while len(values) < resamples:
        size = min(_AT_ONCE, resamples - len(values))
        sums = generator.multinomial(rows, even, size=size) @ matrix
        values += [found.value(each) for each in sums.tolist()]
    return value, numpy.array(values)


def _interval(draws: numpy.ndarray[Any, Any] | None) -> tuple[float, float] | None:
    import numpy

    if draws is None:
        return None
    # A draw can miss every row that counts, such as the only one whose reference is JSON.
    finite = draws[numpy.isfinite(draws)]
    if len(finite) < len(draws) / 2:
        return None
    low, high = numpy.percentile(finite, _EDGES).tolist()
    return low, high


def _verdict(interval: tuple[float, float], higher_is_better: bool) -> str:
    low, high = interval
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if (low > 0) == higher_is_better else "worse"
