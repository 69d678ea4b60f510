"""Intervals cover what they claim, pair their rows, and repeat with their seed."""

from __future__ import annotations

import math
import random

import pytest

from mst.evaluate.figures import Statistic, figure, mean_of, ratio_of


def draws(rows: int, mean: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(mean, 1) for _ in range(rows)]


def test_an_interval_holds_the_true_mean_in_about_95_of_100_sets() -> None:
    covered = 0
    for seed in range(200):
        interval = figure(mean_of("m", draws(60, 3.0, seed)), seed=seed, resamples=400).interval

        assert interval is not None
        covered += interval[0] <= 3.0 <= interval[1]

    assert 0.90 <= covered / 200 <= 0.99


def test_pairing_finds_a_small_difference_between_rows_that_vary_much() -> None:
    base = [10 * each for each in draws(100, 0.0, 1)]
    better = [each + 0.5 + noise / 10 for each, noise in zip(base, draws(100, 0, 2), strict=True)]
    found = figure(mean_of("m", better), mean_of("m", base))

    assert found.verdict == "better"
    assert found.difference == pytest.approx(0.5, abs=0.05)
    assert found.interval is not None
    assert found.interval[0] < 0 < found.interval[1]


def test_a_lower_loss_is_better_and_equal_rows_show_no_difference() -> None:
    low, high = [(1.0, 2.0)] * 40, [(3.0, 2.0)] * 40
    better = figure(ratio_of("loss", low, False), ratio_of("loss", high, False))
    worse = figure(ratio_of("loss", high, False), ratio_of("loss", low, False))
    same = figure(ratio_of("loss", low, False), ratio_of("loss", low, False))

    assert (better.verdict, worse.verdict) == ("better", "worse")
    assert (better.value, better.before, better.difference) == (0.5, 1.5, -1.0)
    assert same.verdict == "no difference shown"


def test_draws_depend_on_the_seed_alone() -> None:
    found = mean_of("m", draws(30, 0, 5))

    assert figure(found, seed=1) == figure(found, seed=1)
    assert figure(found, seed=1).interval != figure(found, seed=2).interval


def test_the_interval_of_a_ratio_is_that_of_sums_not_of_the_rows_ratios() -> None:
    parts = [(1.0, 1.0)] * 20 + [(0.0, 99.0)] * 20
    found = figure(ratio_of("loss", parts, False))

    assert found.value == pytest.approx(20 / 2000)
    assert found.interval is not None
    assert found.interval[1] < 0.03


@pytest.mark.parametrize("rows", [None, ((2.0, 1.0),)])
def test_a_figure_without_rows_or_with_one_has_no_interval(
    rows: tuple[tuple[float, ...], ...] | None,
) -> None:
    statistic = Statistic("m", rows, lambda sums: sums[0], whole=2.0)
    found = figure(statistic, statistic)

    assert found.value == found.before == 2.0
    assert found.interval is None
    assert found.difference_interval is None
    assert found.verdict is None


def test_a_figure_that_the_rows_do_not_make_is_none_not_nan() -> None:
    found = figure(ratio_of("m", [(0.0, 0.0)] * 5))

    assert (found.value, found.interval) == (None, None)
    assert not math.isnan(found.rows)
