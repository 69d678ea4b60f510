"""`--activation-offloading`: taken where nothing fits without it, and counted on both sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.core.test_planner import OLD_XEON, SMOLLM2, planned
from tests.reference_models import LLAMA_2_7B
from tests.reference_plans import planned as planned_on
from tests.reference_plans import rows

from mst.errors import PlanError
from mst.explicit import as_explicit
from mst.hardware import read_hardware
from mst.longest import longest_rows
from mst.plan import Plan, PrivacyBudget
from mst.registry import load
from mst.request import TrainRequest
from mst.resume import CHANGEABLE_ON_RESUME
from mst.retry import configuration_of, next_smaller
from mst.shortfall import NothingFits
from mst.space import open_space
from mst.training.faults import too_large
from mst.workload import DataFacts

LONG = replace(LLAMA_2_7B, max_position_embeddings=131_072)
CARD = "rtx-3090+cpu-32c-256gb"
ROWS = rows(20_480, 64)
STREAM = 20_480 * 4096 * 2


def asked(switch: str = "auto", **others: Any) -> TrainRequest:
    values = {"tuner": "lora", "per_device_train_batch_size": 1, "deepspeed": "off"}
    return TrainRequest(activation_offloading=switch, **{**values, **others})


def card(request: TrainRequest, data: DataFacts = ROWS) -> Plan:
    return planned_on(LONG, CARD, request, data)


def why(made: Plan) -> list[str]:
    return [each.why for each in made.reasons if each.choice == "activation_offloading"]


def test_it_is_taken_where_checkpointing_alone_does_not_fit() -> None:
    made = card(asked())

    assert made.activation_offloading
    assert made.gradient_checkpointing
    assert made.checkpointed_layers is None
    (reason,) = why(made)
    assert "lies in the host's memory" in reason
    assert f"{made.memory.peak_bytes / 2**30:.2f} GiB with it" in reason
    with pytest.raises(NothingFits, match="--activation-offloading auto"):
        card(asked("off"))


@pytest.mark.parametrize("length", [1024, 8192])
def test_it_is_left_alone_where_something_else_fits(length: int) -> None:
    made = card(asked(), rows(length, 64))

    assert not made.activation_offloading
    assert why(made) == []
    assert not any(each.configuration.activation_offloading for each in made.alternatives)


def test_another_way_that_fits_without_it_comes_first() -> None:
    made = card(asked(tuner="auto"))

    assert (made.tuner, made.activation_offloading) == ("qlora", False)
    ways = {(one.configuration.tuner, one.configuration.activation_offloading)
            for one in made.alternatives if not one.why_not}  # fmt: skip
    assert ("lora", True) in ways


def test_the_device_keeps_two_layers_states_and_the_host_all_but_one() -> None:
    plain, kept = (
        card(asked(each, gradient_checkpointing="on"), rows(8192, 64)) for each in ("off", "on")
    )
    stream = 8192 * 4096 * 2

    assert plain.memory.peak_bytes - kept.memory.peak_bytes == pytest.approx(30 * stream, rel=0.05)
    # 64 MiB are a power of two, as pinned memory is handed out.
    assert kept.memory.host_bytes - plain.memory.host_bytes == 31 * stream
    assert plain.time is not None
    assert kept.time is not None
    bus = 0.75 * 15.75e9
    accumulation = kept.gradient_accumulation_steps
    assert kept.time.step_seconds - plain.time.step_seconds == pytest.approx(
        2 * 31 * stream * accumulation / bus, rel=1e-6
    )


def test_pinned_memory_is_counted_in_powers_of_two_and_for_each_device() -> None:
    one = card(asked("on"))
    two = planned_on(
        LONG, "rtx-3090:2+cpu-32c-256gb", asked("on", nproc_per_node=2, async_save="off"), ROWS
    )

    # Of 160 MiB a layer.
    assert STREAM == 160 * 2**20
    assert one.memory.host_bytes >= 31 * 2**28
    assert two.memory.host_bytes == 2 * 31 * 2**28


def test_where_the_hosts_memory_is_not_known_or_too_small_it_is_not_taken() -> None:
    for where in ("rtx-3090", "rtx-3090+cpu-4c-4gb"):
        with pytest.raises(NothingFits):
            planned_on(LONG, where, asked(), ROWS)


def test_a_step_that_did_not_fit_is_told_of_it_where_it_would_do() -> None:
    import torch

    request = asked("off", gradient_checkpointing="on")
    made, chip = card(request, rows(8192, 64)), torch.device("cuda")
    budget = PrivacyBudget(3.0, 1e-5, "row", 64, 0.5, 9, 1.0, 1.0, "opacus", 3.0)

    assert "--activation-offloading on" in str(too_large(chip, 1, 1, made, request))
    for other in (replace(made, privacy=budget), replace(made, activation_offloading=True)):
        assert "--activation-offloading" not in str(too_large(chip, 1, 1, other, request))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gradient_checkpointing": "off"}, "--gradient-checkpointing off recomputes none"),
        ({"dp_epsilon": 3.0, "tuner": "lora"}, "recomputed in torch's older form"),
    ],
)
def test_what_it_can_not_go_with_is_an_error_that_says_why(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        card(asked("on", **changes))


def test_a_cpu_refuses_it_with_the_reason_and_never_takes_it() -> None:
    data = DataFacts((400,) * 64, (300,) * 64, 0, None, 400, 400, 0)
    with pytest.raises(
        PlanError, match=r"a CPU's activations are in the host's memory already\. Pass"
    ):
        planned(OLD_XEON, SMOLLM2, data, asked("on"))
    small = planned(OLD_XEON, SMOLLM2, data, asked(memory_budget="1.4GB"))
    assert not small.activation_offloading


def test_a_resumed_and_a_smaller_run_keep_it() -> None:
    data = rows(1024, 64)
    made = card(asked("on", gradient_checkpointing="12"), data)
    smaller = next_smaller(made, LONG, data, asked("on"))

    assert (made.activation_offloading, made.checkpointed_layers) == (True, 12)
    assert configuration_of(made, asked()).activation_offloading
    # Copies are exact, so that a run may go on without it: on a CPU, say.
    assert as_explicit(asked("on"), made).activation_offloading == "on"
    assert as_explicit(asked(), made).activation_offloading == "auto"
    assert "activation_offloading" in CHANGEABLE_ON_RESUME
    assert smaller is not None
    assert smaller.activation_offloading


def test_the_longest_rows_know_it() -> None:
    where = read_hardware(CARD, load())

    def lengths(request: TrainRequest) -> dict[tuple[bool, bool], int]:
        space = open_space(
            where.devices, where.capabilities, LONG, rows(), request, where.host_bytes
        )
        return {
            (one.at.configuration.checkpointing, one.at.configuration.activation_offloading):
            one.max_length for one in longest_rows(space).limits
        }  # fmt: skip

    found = lengths(asked())

    assert found[True, True] > 1.5 * found[True, False] > found[False, False] > 0
    assert lengths(asked("on")) == {(True, True): found[True, True]}
    assert (True, True) not in lengths(asked("off"))
    most = found[True, True]
    assert card(asked(async_save="off"), rows(most, 64)).activation_offloading
    with pytest.raises(NothingFits):
        card(asked(async_save="off"), rows(most + 64, 64))
