"""Draws come from the key and the step alone, and are distributed as they should be."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from mst.errors import RunError
from mst.privacy.draws import KEY_FILE, drawn_units, make_key, normal_draws, read_key

KEY = bytes(range(32))


def test_noise_is_standard_normal() -> None:
    from scipy.stats import kstest

    values = normal_draws(KEY, 3)(200_001).numpy()

    assert len(values) == 200_001
    assert kstest(values, "norm").pvalue > 0.01
    # Box and Muller make two values of each pair: these must not hang together.
    half = len(values) // 2
    assert abs((values[:half] * values[half : 2 * half]).mean()) < 0.01


def test_a_step_that_is_taken_again_draws_the_same_and_others_draw_others() -> None:
    first = normal_draws(KEY, 7)
    whole = normal_draws(KEY, 7)(10)

    assert [*first(4).tolist(), *first(6).tolist()] != whole.tolist()  # pairs lie otherwise
    assert normal_draws(KEY, 7)(10).tolist() == whole.tolist()
    assert normal_draws(KEY, 8)(10).tolist() != whole.tolist()
    assert normal_draws(bytes(32), 7)(10).tolist() != whole.tolist()
    assert drawn_units(KEY, 7, 1000, 0.5) == drawn_units(KEY, 7, 1000, 0.5)
    assert drawn_units(KEY, 7, 1000, 0.5) != drawn_units(KEY, 8, 1000, 0.5)


def test_each_unit_is_drawn_by_itself_with_the_probability_asked_for() -> None:
    from scipy.stats import binomtest, chisquare

    rate, units, steps = 0.1, 20, 4000
    drawn = [drawn_units(KEY, step, units, rate) for step in range(steps)]
    total = sum(map(len, drawn))
    times = [sum(unit in each for each in drawn) for unit in range(units)]
    empty = sum(not each for each in drawn)

    assert binomtest(total, units * steps, rate).pvalue > 0.01
    assert chisquare(times).pvalue > 0.01
    assert binomtest(empty, steps, (1 - rate) ** units).pvalue > 0.01


def test_all_units_are_drawn_at_rate_1() -> None:
    assert drawn_units(KEY, 0, 5, 1.0) == [0, 1, 2, 3, 4]


def test_the_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    key = make_key(tmp_path)

    assert read_key(tmp_path) == key
    assert len(key) == 32
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("text", [None, "", "no key", "ab" * 31])
def test_a_run_does_not_go_on_without_its_key(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / KEY_FILE).write_text(text)
    with pytest.raises(RunError, match="missing or damaged"):
        read_key(tmp_path)
