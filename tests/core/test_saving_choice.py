"""`--async-save`: written beside the steps where the copy fits, and counted in the forecast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.core.test_planner import OLD_XEON, RTX_3090, SMOLLM2, planned
from tests.reference_models import LLAMA_2_7B
from tests.reference_plans import planned as planned_on

from mst.errors import PlanError
from mst.explicit import as_explicit
from mst.memory.states import trained_weights
from mst.model.facts import lora_parameters, lora_targets
from mst.plan import Plan
from mst.request import TrainRequest
from mst.retry import configuration_of, next_smaller
from mst.workload import DataFacts

ROWS = DataFacts((400,) * 512, (300,) * 512, 0, None, 400, 400, 0)


def asked(switch: str = "auto", **others: Any) -> TrainRequest:
    return TrainRequest(async_save=switch, **others)


def why(made: Plan) -> tuple[str, str]:
    (reason,) = [each for each in made.reasons if each.choice == "async_save"]
    return reason.value, reason.why


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_on_a_cpu_the_copy_takes_the_weights_and_moments_once_more(tuner: str) -> None:
    with_copy = planned(OLD_XEON, SMOLLM2, ROWS, asked(tuner=tuner))
    without = planned(OLD_XEON, SMOLLM2, ROWS, asked("off", tuner=tuner))
    trained = trained_weights(
        SMOLLM2,
        lora_targets(SMOLLM2, ("all-linear",)),
        configuration_of(with_copy, TrainRequest()),
    )

    assert (with_copy.async_save, without.async_save) == (True, False)
    assert with_copy.memory.peak_bytes - without.memory.peak_bytes == 12 * trained
    assert with_copy.memory.host_bytes == 0
    assert why(with_copy)[0] == "on"
    assert "a copy of weights and moments takes" in why(with_copy)[1]


def test_on_an_accelerator_it_is_the_hosts_memory() -> None:
    with_copy = planned_on(LLAMA_2_7B, "rtx-3090+cpu-32c-256gb", asked(tuner="lora"))
    trained = lora_parameters(lora_targets(LLAMA_2_7B, ("all-linear",)), 8)

    assert with_copy.async_save
    assert with_copy.memory.host_bytes == 12 * trained
    assert (
        with_copy.memory.peak_bytes
        == planned_on(
            LLAMA_2_7B, "rtx-3090+cpu-32c-256gb", asked("off", tuner="lora")
        ).memory.peak_bytes
    )


def test_where_the_hosts_memory_is_not_known_a_save_is_waited_for() -> None:
    made = planned(RTX_3090, LLAMA_2_7B, ROWS)

    assert not made.async_save
    assert "of the host's memory, whose size is not known" in why(made)[1]


def test_where_the_copy_does_not_fit_the_budget_a_save_is_waited_for() -> None:
    waited = planned(OLD_XEON, SMOLLM2, ROWS, asked("off", tuner="full"))
    budget = f"{waited.memory.peak_bytes / 1e6 + 1:.3f}MB"
    made = planned(OLD_XEON, SMOLLM2, ROWS, asked(tuner="full", memory_budget=budget))

    assert not made.async_save
    assert made.memory == waited.memory
    assert why(made)[0] == "off"
    assert "may be used (--memory-budget)" in why(made)[1]


def test_when_it_is_asked_for_the_plan_makes_room() -> None:
    waited = planned(OLD_XEON, SMOLLM2, ROWS, asked("off", tuner="full"))
    budget = f"{waited.memory.peak_bytes / 1e6 + 1:.3f}MB"
    made = planned(OLD_XEON, SMOLLM2, ROWS, asked("on", tuner="full", memory_budget=budget))

    assert made.async_save
    assert made.memory.peak_bytes <= waited.memory.peak_bytes + 10**6
    assert made.gradient_checkpointing or made.per_device_train_batch_size < (
        waited.per_device_train_batch_size
    )


def test_under_zero_a_save_is_waited_for() -> None:
    made = planned_on(LLAMA_2_7B, "a100-80gb:4+cpu-32c-256gb", asked(deepspeed="zero3"))

    assert not made.async_save
    assert why(made) == (
        "off", "DeepSpeed's ranks gather what they share out for each save, in step"
    )  # fmt: skip
    with pytest.raises(PlanError, match=r"with zero3 DeepSpeed's ranks .* --async-save off"):
        planned_on(LLAMA_2_7B, "a100-80gb:4", asked("on", deepspeed="zero3"))


def test_with_ddp_rank_0_saves_beside_the_steps() -> None:
    assert planned_on(LLAMA_2_7B, "a100-80gb:4+cpu-32c-256gb", asked(tuner="lora")).async_save


def test_a_plan_that_did_not_fit_waits_for_its_saves() -> None:
    made = planned(OLD_XEON, SMOLLM2, ROWS)
    smaller = next_smaller(made, SMOLLM2, ROWS, TrainRequest())

    assert made.async_save
    assert smaller is not None
    assert not smaller.async_save
    wanted = next_smaller(made, SMOLLM2, ROWS, asked("on"))
    assert wanted is not None
    assert wanted.async_save


def test_a_resumed_run_keeps_what_was_asked() -> None:
    made = planned(OLD_XEON, SMOLLM2, ROWS)

    assert as_explicit(asked("off"), replace(made, async_save=False)).async_save == "off"
    assert as_explicit(asked(), made).async_save == "auto"
