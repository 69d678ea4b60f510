"""How much noise a run needs for the ε that was asked for, said by one accountant, checked by two.

Planning comes here once the steps are known; nothing of the data but its number of units matters.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

from mst.errors import PlanError
from mst.launch import offline_environment
from mst.plan import Plan, PrivacyBudget, Reason
from mst.privacy.loss_distribution import epsilon
from mst.request import TrainRequest

# Both accountants bound ε from above, Opacus's by 0.01 and more too high (its eps_error).
AGREEMENT_RELATIVE, AGREEMENT_ABSOLUTE = 0.02, 0.02
ACCOUNTANT = "mst.privacy.opacus_accountant"


def with_budget(plan: Plan, request: TrainRequest, units: int) -> Plan:
    """Return the plan with the noise that keeps the ε that was asked for.

    Args:
        plan: with its steps.
        request: asks for an ε.
        units: of the training data.

    Raises:
        PlanError: Opacus is missing or finds no noise, δ is too large, or the accountants differ.
    """
    asked = request.dp_epsilon
    assert asked is not None
    delta = request.dp_delta or 1 / (10 * units)
    # With a larger one, giving away one unit whole would be within the bound.
    if delta >= 1 / units:
        raise PlanError(
            f"--dp-delta {delta:g} was asked for; with {units} units to protect it must be below"
            f" 1 / {units} = {1 / units:.2g}, or the bound would allow to give one of them away."
            f" Pass {1 / (10 * units):.1g}, or leave it out."
        )
    rate = min(1.0, plan.global_batch / units)
    found = _opacus(asked, delta, rate, plan.total_steps)
    noise = float(found["noise_multiplier"])
    second = epsilon(noise, rate, plan.total_steps, delta)
    if abs(second - found["epsilon"]) > AGREEMENT_RELATIVE * asked + AGREEMENT_ABSOLUTE:
        raise PlanError(
            f"two accountants differ: with noise {noise:.3g} Opacus finds"
            f" ε = {found['epsilon']:.3f}, the second {second:.3f}. Neither is to be relied on."
            " Change --dp-epsilon or the batch size, and please report the figures."
        )
    budget = PrivacyBudget(
        epsilon=float(found["epsilon"]),
        delta=delta,
        unit=request.dp_unit or "row",
        units=units,
        sample_rate=rate,
        steps=plan.total_steps,
        noise_multiplier=noise,
        max_grad_norm=request.max_grad_norm,
        accountant=f"prv, opacus {found['version']}",
        epsilon_checked=second,
    )
    return replace(
        plan,
        privacy=budget,
        reasons=(*plan.reasons, *_reasons(budget)),
        warnings=(*plan.warnings, *_warnings(budget)),
    )


def _reasons(budget: PrivacyBudget) -> list[Reason]:
    found = (
        f"of the weights, for each {budget.unit}, at δ = {budget.delta:.2g}; a second accountant"
        f" finds {budget.epsilon_checked:.3f}"
    )
    noise = (
        f"times the clipping norm {budget.max_grad_norm:g}, in each of {budget.steps} steps, which"
        f" draw each of {budget.units} units with probability {budget.sample_rate:.3g}"
    )
    return [
        Reason("epsilon", f"{budget.epsilon:.3f}", found),
        Reason("noise", f"{budget.noise_multiplier:.3f}", noise),
    ]


def _warnings(budget: PrivacyBudget) -> list[str]:
    text = (
        "differential privacy is experimental; it covers the tuned weights, not metrics, logs or"
        " held-out figures"
    )
    if budget.unit == "row":
        text += "; who stands in several rows is protected only with --dp-unit COLUMN"
    return [text]


def _opacus(epsilon: float, delta: float, rate: float, steps: int) -> dict[str, float]:
    if importlib.util.find_spec("opacus") is None:
        raise PlanError(
            "--dp-epsilon was asked for, which needs Opacus, and it is not installed here. Install"
            " it: python -m pip install 'mst-train[dp]'"
        )
    asked = {"epsilon": epsilon, "delta": delta, "sample_rate": rate, "steps": steps}
    done = subprocess.run(
        [sys.executable, "-m", ACCOUNTANT, json.dumps(asked)],
        env={**os.environ, **offline_environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PlanError(
            f"--dp-epsilon {epsilon:g} was asked for, at δ = {delta:.2g} over {steps} steps; Opacus"
            " finds no noise for it. Ask for a larger ε, or for fewer steps."
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
