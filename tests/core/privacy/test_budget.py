"""The noise of a plan keeps the ε that was asked for, by both accountants."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from tests.core.training.conftest import tiny_plan

from mst.errors import PlanError
from mst.plan import Plan
from mst.privacy.budget import with_budget
from mst.privacy.loss_distribution import epsilon
from mst.request import TrainRequest

pytest.importorskip("opacus", reason="wants the extra dp")


@pytest.fixture
def plan(tiny_model: Path) -> Plan:
    """Sixteen units a step, for 40 steps."""
    return tiny_plan(tiny_model, gradient_accumulation_steps=8, total_steps=40)


def test_the_noise_is_the_least_that_keeps_epsilon(plan: Plan) -> None:
    made = with_budget(plan, TrainRequest(dp_epsilon=2.0), units=400).privacy
    assert made is not None
    less = epsilon(0.97 * made.noise_multiplier, made.sample_rate, made.steps, made.delta)

    assert made.epsilon <= 2.0 < less
    assert made.epsilon_checked == pytest.approx(made.epsilon, abs=0.03)
    assert (made.sample_rate, made.steps, made.delta) == (16 / 400, 40, 1 / 4000)
    assert made.accountant.startswith("prv, opacus ")


def test_more_units_a_step_than_there_are_draw_each_of_them(plan: Plan) -> None:
    made = with_budget(plan, TrainRequest(dp_epsilon=8.0), units=10).privacy

    assert made is not None
    assert made.sample_rate == 1.0


def test_a_delta_that_would_give_a_unit_away_is_refused(plan: Plan) -> None:
    request = TrainRequest(dp_epsilon=2.0, dp_delta=0.01)
    with pytest.raises(PlanError, match=r"--dp-delta 0\.01 .* must be below 1 / 100"):
        with_budget(plan, request, units=100)


def test_the_plan_says_what_is_not_covered(plan: Plan) -> None:
    rows = with_budget(plan, TrainRequest(dp_epsilon=8.0), units=100)
    people = with_budget(plan, TrainRequest(dp_epsilon=8.0, dp_unit="patient"), units=100)

    assert "not metrics, logs or held-out figures" in rows.warnings[-1]
    assert "--dp-unit" in rows.warnings[-1]
    assert "--dp-unit" not in people.warnings[-1]
    assert people.privacy is not None
    assert people.privacy.unit == "patient"


def test_without_opacus_the_install_command_is_named(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "opacus" else real(name)
    )
    with pytest.raises(PlanError, match=r"pip install 'mst-train\[dp\]'"):
        with_budget(plan, TrainRequest(dp_epsilon=8.0), units=100)


def test_accountants_that_differ_are_not_believed(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mst.privacy.budget.epsilon", lambda *_: 2.2)
    with pytest.raises(PlanError, match=r"two accountants differ: .* the second 2\.200"):
        with_budget(replace(plan, total_steps=20), TrainRequest(dp_epsilon=2.0), units=400)
