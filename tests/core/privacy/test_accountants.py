"""ε by three independent programs, and by the closed form where there is one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mst.privacy.loss_distribution import epsilon

DATA = Path(__file__).resolve().parents[2] / "data/privacy/pld.json"
CASES: list[dict[str, Any]] = json.loads(DATA.read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda each: f"{each['steps']} steps")
def test_epsilon_is_that_of_dp_accounting(case: dict[str, Any]) -> None:
    found = epsilon(case["noise_multiplier"], case["sample_rate"], case["steps"], case["delta"])

    assert found == pytest.approx(case["epsilon"], rel=1e-3)


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"), [(6.25, 20, 1e-5), (1.0, 1, 1e-5), (0.5, 1, 1e-3), (1.0, 3, 1e-8)]
)
def test_epsilon_without_sampling_is_that_of_the_gaussian_mechanism(
    sigma: float, steps: int, delta: float
) -> None:
    from scipy.special import ndtr

    found = epsilon(sigma, 1.0, steps, delta)
    # Balle and Wang 2018, "Improving the Gaussian Mechanism for Differential Privacy", theorem 8;
    # so many steps are one with less noise.
    one = sigma / math.sqrt(steps)
    below = ndtr(1 / (2 * one) - found * one)
    above = ndtr(-1 / (2 * one) - found * one)

    assert float(below - math.exp(found) * above) == pytest.approx(delta, rel=1e-4)


def test_epsilon_falls_with_noise_and_grows_with_steps_and_sampling() -> None:
    base = epsilon(1.0, 0.02, 100, 1e-6)

    assert epsilon(1.1, 0.02, 100, 1e-6) < base
    assert epsilon(1.0, 0.02, 110, 1e-6) > base
    assert epsilon(1.0, 0.03, 100, 1e-6) > base
    assert epsilon(1.0, 0.02, 100, 1e-5) < base


def test_hardly_any_noise_has_no_bound_rather_than_a_wrong_one() -> None:
    assert epsilon(0.01, 0.5, 1000, 1e-6) == math.inf
