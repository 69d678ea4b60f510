"""`--memory-budget`: the fastest plan that takes no more than the user allows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.core.test_planner import LLAMA_7B, LONG, OLD_XEON, RTX_3090, SHORT, SMOLLM2, planned
from tests.reference_models import LLAMA_2_7B
from tests.reference_plans import planned as planned_on

from mst.cli import main
from mst.errors import PlanError
from mst.explicit import as_explicit
from mst.facts import Capabilities, DeviceFacts
from mst.job import begin, prepare_job
from mst.model.facts import ModelFacts
from mst.plan import Plan
from mst.planner import plan
from mst.quantities import size_bytes
from mst.request import TrainRequest
from mst.retry import next_smaller
from mst.workload import DataFacts

GIB = 2**30
WIDE = DataFacts((40,) * 512, (30,) * 512, 0, None, 40, 40, 0)
ROWS = DataFacts((400,) * 512, (300,) * 512, 0, None, 400, 400, 0)


def budget(size: str, **others: object) -> TrainRequest:
    return replace(TrainRequest(), memory_budget=size, **others)  # type: ignore[arg-type]


def whys(made: Plan) -> dict[str, str]:
    return {each.choice: each.why for each in made.reasons}


@pytest.mark.parametrize(
    ("where", "model", "data", "size"),
    [
        (RTX_3090, LLAMA_7B, ROWS, "18GB"),
        (RTX_3090, LLAMA_7B, ROWS, "16GiB"),
        (RTX_3090, SMOLLM2, LONG, "3GB"),
        (OLD_XEON, SMOLLM2, LONG, "3GB"),
        (OLD_XEON, SMOLLM2, WIDE, "2GB"),
        (OLD_XEON, SMOLLM2, WIDE, "1.35GB"),
    ],
)
def test_a_budget_changes_the_choice_and_holds_the_forecast(
    where: DeviceFacts, model: ModelFacts, data: DataFacts, size: str
) -> None:
    free = planned(where, model, data)
    made = planned(where, model, data, budget(size))

    assert free.memory.peak_bytes > size_bytes(size, "")
    assert made.memory.peak_bytes <= size_bytes(size, "")
    assert made.global_batch == free.global_batch
    assert made.gradient_checkpointing > free.gradient_checkpointing or (
        made.per_device_train_batch_size < free.per_device_train_batch_size
    )


def test_the_budget_is_used_whole_and_named_where_it_is_the_bound() -> None:
    needed = planned(OLD_XEON, SMOLLM2, ROWS).memory.peak_bytes
    exact = f"{needed / 1e6 + 0.001:.3f}MB"
    made = planned(OLD_XEON, SMOLLM2, ROWS, budget(exact))

    assert made.memory.peak_bytes == needed
    assert made.memory.available_bytes == 64 * GIB
    assert "may be used at the most, though 64.00 GiB are free" in whys(made)["memory_budget"]
    assert "may be used (--memory-budget)" in whys(made)["gradient_checkpointing"]
    assert made.warnings == ()


def test_a_budget_beyond_what_is_free_changes_nothing_but_is_told_of() -> None:
    free = planned(RTX_3090, LLAMA_7B, ROWS)
    made = planned(RTX_3090, LLAMA_7B, ROWS, budget("80GB"))

    assert made.warnings == (
        "--memory-budget 80GB is more than there is: of the 24.00 GiB free, 21.60 GiB may be used",
    )
    assert replace(made, warnings=()) == free


def test_a_budget_is_all_there_is_to_go_by_where_a_device_cannot_tell_its_memory() -> None:
    silent = replace(RTX_3090, memory_free_bytes=None)
    made = planned(silent, LLAMA_7B, ROWS, budget("18GB"))

    assert made.memory.peak_bytes <= 18e9 < planned(silent, LLAMA_7B, ROWS).memory.peak_bytes
    assert whys(made)["memory_budget"] == "16.76 GiB of a device may be used at the most"


def test_processes_on_a_cpu_share_the_budget() -> None:
    able = Capabilities("cpu", "gloo", ("single", "ddp"), attention=("sdpa",))
    request = budget("5GB", nproc_per_node=2)
    made = plan("cpu", (OLD_XEON,) * 2, (able,) * 2, {}, SMOLLM2, ROWS, request)

    assert 2 * made.memory.peak_bytes <= 5e9


def test_each_of_several_devices_has_the_budget() -> None:
    made = planned_on(LLAMA_2_7B, "a100-80gb:4", budget("40GiB"))
    free = planned_on(LLAMA_2_7B, "a100-80gb:4")

    assert made.memory.peak_bytes <= 40 * GIB < free.memory.peak_bytes
    assert made.world_size == 4


@pytest.mark.parametrize(("where", "size"), [(RTX_3090, "10GB"), (OLD_XEON, "4GB")])
def test_when_nothing_fits_the_budget_is_blamed_and_the_one_named_would_do(
    where: DeviceFacts, size: str
) -> None:
    request = budget(size, tuner="lora")
    with pytest.raises(PlanError) as found:
        planned(where, LLAMA_7B, ROWS, request)
    text = str(found.value)
    named = re.search(r"What would do: --memory-budget ([\d.]+[MG]iB)", text)

    assert f"--memory-budget {size} leaves a plan {size_bytes(size, '') / GIB:.2f} GiB of" in text
    assert "may be used (--memory-budget): " in text
    assert "a chip with" not in text
    assert "a machine with" not in text
    assert named is not None
    made = planned(where, LLAMA_7B, ROWS, replace(request, memory_budget=named[1]))
    assert size_bytes(size, "") < made.memory.peak_bytes <= size_bytes(named[1], "")


def test_what_is_free_is_blamed_where_the_budget_is_not_the_bound() -> None:
    small = replace(RTX_3090, memory_free_bytes=4 * GIB)
    with pytest.raises(PlanError, match=r"has 4\.00 GiB free, of which 90%") as found:
        planned(small, LLAMA_7B, ROWS, budget("100GB", tuner="lora"))

    assert "--memory-budget" not in str(found.value)
    assert "a chip with" in str(found.value)


def test_a_retry_and_a_resumed_run_keep_the_budget() -> None:
    request = budget("2GB")
    made = planned(OLD_XEON, SMOLLM2, WIDE, request)
    kept = as_explicit(request, made)
    smaller = next_smaller(made, SMOLLM2, WIDE, request)

    assert smaller is not None
    assert smaller.memory.peak_bytes < made.memory.peak_bytes <= 2e9
    assert as_explicit(request, smaller).memory_budget == kept.memory_budget == "2GB"
    assert planned(OLD_XEON, SMOLLM2, WIDE, kept).memory == made.memory
    with pytest.raises(PlanError, match="--memory-budget 1GB leaves a plan"):
        planned(OLD_XEON, SMOLLM2, WIDE, replace(kept, memory_budget="1GB"))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("20GB", 20 * 10**9),
        ("20GiB", 20 * 2**30),
        ("512mb", 512 * 10**6),
        ("1.5 TiB", 3 * 2**39),
        (" 700MiB ", 700 * 2**20),
        ("20G", 20 * 2**30),
        ("512m", 512 * 2**20),
    ],
)
def test_sizes_have_units(text: str, count: int) -> None:
    assert size_bytes(text, "--memory-budget") == count


@pytest.mark.parametrize(
    "text", ["20", "20GBit", "0GB", "-1GB", "GB", "1e3GB", "20GBs", "٢GB", "nan"]
)
def test_what_is_no_size_is_wrong_usage(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tune.yaml"
    file.write_text(f"memory_budget: {text}\n", encoding="utf-8")

    for command in (["plan", f"--memory-budget={text}"], ["train", str(file)]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "takes a size with its unit, such as 512MB, 20GB" in said
        assert f"found '{text}'" in said


def test_mst_plan_names_the_budget_in_text_and_json(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"query": "Hello", "response": "Good day"}\n' * 40, encoding="utf-8")
    plain = ["plan", "--model", str(tiny_model), "--dataset", str(data), "--on", "a100-80gb:4"]

    assert main([*plain, "--memory-budget", "20GB", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["plan"]
    named = next(each for each in made["reasons"] if each["choice"] == "memory_budget")
    assert named["value"] == "20GB"
    assert named["why"].startswith("18.63 GiB of a device may be used at the most, though 7")
    assert made["peak_bytes"] <= 20e9

    assert main([*plain, "--memory-budget", "20GB"]) == 0
    assert "memory_budget" in capsys.readouterr().out
    assert main([*plain, "--memory-budget", "1MB"]) == 1
    assert "--memory-budget 1MB leaves a plan 1.0 MiB" in capsys.readouterr().err


def test_a_run_that_is_resumed_has_its_budget_unless_another_is_given(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text('{"query": "Hello", "response": "Good day"}\n' * 40, encoding="utf-8")
    request = budget(
        "900MB", model=str(tiny_model), dataset=(str(data),), device="cpu", output_dir=str(run)
    )
    begin(prepare_job(request, {}))[1].close()
    resumed = ["plan", "--json", "--resume", "--output-dir", str(run)]

    for more, size in (([], "900MB"), (["--memory-budget", "950MB"], "950MB")):
        assert main([*resumed, *more]) == 0
        reasons = json.loads(capsys.readouterr().out)["plan"]["reasons"]
        assert size in [each["value"] for each in reasons if each["choice"] == "memory_budget"]
    assert main([*resumed, "--memory-budget", "1MB"]) == 1
    assert "--memory-budget 1MB leaves a plan" in capsys.readouterr().err


def test_without_a_budget_none_is_named() -> None:
    assert "memory_budget" not in whys(planned(RTX_3090, SMOLLM2, SHORT))
