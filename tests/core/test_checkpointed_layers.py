"""`--gradient-checkpointing N`: as few layers are recomputed as will fit, or so many as asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.core.test_planner import AMX, COMPILING, OLD_XEON, RTX_3090, SMOLLM2, planned
from tests.reference_models import LLAMA_2_7B
from tests.reference_plans import planned as planned_on

from mst.cli import main
from mst.errors import PlanError
from mst.explicit import as_explicit
from mst.facts import DeviceFacts
from mst.model.facts import ModelFacts
from mst.plan import Plan
from mst.planner import plan
from mst.request import TrainRequest
from mst.retry import next_smaller
from mst.rundir import RunManifest
from mst.seal.audit.arguments import given_fields
from mst.serial import from_json
from mst.shortfall import NothingFits
from mst.workload import DataFacts

OLD = Path(__file__).resolve().parents[1] / "data/runs"
ROWS = DataFacts((1024,) * 64, (300,) * 64, 0, None, 1024, 1024, 0)


def asked(switch: str, **others: Any) -> TrainRequest:
    values: dict[str, Any] = {
        "gradient_checkpointing": switch,
        "per_device_train_batch_size": 1,
        "tuner": "lora",
    }
    return TrainRequest(**values | others)


def between(where: DeviceFacts, model: ModelFacts, share: float) -> str:
    """Return a budget between what a plan takes with all layers recomputed, and with none."""
    none, every = (planned(where, model, ROWS, asked(each)) for each in ("off", "on"))
    low, high = every.memory.peak_bytes, none.memory.peak_bytes
    return f"{(low + share * (high - low)) / 1e6:.3f}MB"


# On a CPU what is left above a quarter is the roomy heap's, and the tight one needs no layer.
@pytest.mark.parametrize(
    ("where", "model", "share"),
    [
        (RTX_3090, LLAMA_2_7B, 0.1),
        (RTX_3090, LLAMA_2_7B, 0.5),
        (RTX_3090, LLAMA_2_7B, 0.9),
        (OLD_XEON, SMOLLM2, 0.1),
    ],
)
def test_as_few_layers_are_recomputed_as_fit_the_budget(
    where: DeviceFacts, model: ModelFacts, share: float
) -> None:
    budget = between(where, model, share)
    made = planned(where, model, ROWS, asked("auto", memory_budget=budget))
    count = made.checkpointed_layers
    fewer = asked(str((count or 0) - 1), memory_budget=budget)
    every = planned(where, model, ROWS, asked("on", memory_budget=budget))

    assert made.gradient_checkpointing
    assert count is not None
    assert 1 < count < model.layers
    if made.time is not None and every.time is not None:
        assert made.time.step_seconds < every.time.step_seconds
    if made.heap == "tight":
        with pytest.raises(NothingFits):
            planned(where, model, ROWS, fewer)


def test_the_reason_says_what_none_these_and_all_would_need() -> None:
    made = planned(
        RTX_3090, LLAMA_2_7B, ROWS, asked("auto", memory_budget=between(RTX_3090, LLAMA_2_7B, 0.5))
    )
    (reason,) = [each for each in made.reasons if each.choice == "gradient_checkpointing"]
    count = made.checkpointed_layers

    assert reason.value == str(count)
    assert reason.why.startswith(
        f"recomputes the first {count} of 32 layers, as few as fit: needs "
    )
    assert f"{made.memory.peak_bytes / 2**30:.2f} GiB with these" in reason.why
    assert "may be used (--memory-budget)" in reason.why


def test_more_layers_take_less_memory_and_more_time() -> None:
    plans = [planned(RTX_3090, LLAMA_2_7B, ROWS, asked(each)) for each in ("off", "8", "24", "on")]
    peaks = [each.memory.peak_bytes for each in plans]
    seconds = [each.time.step_seconds for each in plans if each.time]

    assert peaks == sorted(set(peaks), reverse=True)
    assert len(seconds) in (0, 4)
    assert seconds == sorted(set(seconds))
    # Straight between their ends: a layer is a layer.
    assert peaks[2] == pytest.approx(peaks[0] - (peaks[0] - peaks[1]) * 3, rel=0.02)


def test_a_number_is_kept_and_all_layers_are_on() -> None:
    made = planned(RTX_3090, LLAMA_2_7B, ROWS, asked("7"))
    every = planned(RTX_3090, LLAMA_2_7B, ROWS, asked("32"))

    assert (made.gradient_checkpointing, made.checkpointed_layers) == (True, 7)
    assert as_explicit(TrainRequest(), made).gradient_checkpointing == "7"
    assert every.memory == planned(RTX_3090, LLAMA_2_7B, ROWS, asked("on")).memory
    assert as_explicit(TrainRequest(), every).gradient_checkpointing == "on"


@pytest.mark.parametrize("many", ["33", "400"])
def test_more_layers_than_there_are_is_an_error_that_counts_them(many: str) -> None:
    with pytest.raises(PlanError, match=r"the model has 32 decoder layers\. Pass .* 1 to 32"):
        planned(RTX_3090, LLAMA_2_7B, ROWS, asked(many))


def test_a_plan_that_did_not_fit_recomputes_all_layers_next() -> None:
    request = asked("7")
    smaller = next_smaller(planned(RTX_3090, LLAMA_2_7B, ROWS, request), LLAMA_2_7B, ROWS, request)

    assert smaller is not None
    assert (smaller.gradient_checkpointing, smaller.checkpointed_layers) == (True, None)


def test_when_too_few_are_asked_for_the_error_names_all() -> None:
    budget = between(RTX_3090, LLAMA_2_7B, 0.1)
    with pytest.raises(
        NothingFits, match=r"gradient checkpointing 1\).*--gradient-checkpointing on"
    ):
        planned(RTX_3090, LLAMA_2_7B, ROWS, asked("1", memory_budget=budget))


def test_several_devices_and_zero_have_some_layers_too() -> None:
    data = replace(ROWS, lengths=(4096,) * 64, max_length=4096, longest=4096)
    whole = planned_on(LLAMA_2_7B, "a100-40gb:4", asked("off", deepspeed="zero3"), data)
    some = planned_on(LLAMA_2_7B, "a100-40gb:4", asked("12", deepspeed="zero3"), data)
    every = planned_on(LLAMA_2_7B, "a100-40gb:4", asked("on", deepspeed="zero3"), data)

    assert every.memory.peak_bytes < some.memory.peak_bytes < whole.memory.peak_bytes
    assert some.time is not None
    assert whole.time is not None
    assert every.time is not None
    assert whole.time.step_seconds < some.time.step_seconds < every.time.step_seconds


def test_some_layers_alone_are_compiled_in_two_forms() -> None:
    def cost(switch: str) -> str:
        request = asked(switch, max_steps=100_000)
        made = plan("cpu", (AMX,), (COMPILING,), {}, SMOLLM2, ROWS, request)
        return next(each.why for each in made.reasons if each.choice == "torch_compile")

    assert cost("on").startswith("it takes 35 s once")
    assert cost("9").startswith("it takes 70 s once")


def test_a_log_shows_the_number_and_nothing_else() -> None:
    shown = (
        given_fields({"gradient_checkpointing": "12"}),
        given_fields({"gradient_checkpointing": "Bob"}),
    )

    assert shown[0] == {"gradient_checkpointing": "12"}
    assert "Bob" not in json.dumps(shown[1])


def test_plans_and_runs_of_before_are_read() -> None:
    """They have a boolean, of all layers, in the plan, its alternatives and what ran out."""
    made = from_json(Plan, json.loads((OLD / "plan.json").read_text(encoding="utf-8")))
    run = from_json(RunManifest, json.loads((OLD / "run.json").read_text(encoding="utf-8")))
    again = as_explicit(TrainRequest(), made)

    assert (made.gradient_checkpointing, made.checkpointed_layers) == (True, None)
    assert again.gradient_checkpointing == "on"
    ways = {(one.configuration.checkpointing, one.configuration.checkpointed_layers)
            for one in made.alternatives}  # fmt: skip
    assert (True, None) in ways
    assert (run.misses[0].checkpointing, run.misses[0].checkpointed_layers) == (True, None)


def test_mst_plan_shows_the_number_in_text_and_json(
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"query": "Hello", "response": "Good day"}\n' * 40, encoding="utf-8")
    plain = ["plan", "--model", str(tiny_model), "--dataset", str(data), "--on", "a100-80gb"]

    assert main([*plain, "--gradient-checkpointing", "1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["plan"]
    assert (made["gradient_checkpointing"], made["checkpointed_layers"]) == (True, 1)
    assert main([*plain, "--gradient-checkpointing", "1", "--compare"]) == 0
    assert " ckpt 1 " in capsys.readouterr().out
    assert main([*plain, "--gradient-checkpointing", "3"]) == 1
    assert "the model has 2 decoder layers" in capsys.readouterr().err
