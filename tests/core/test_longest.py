"""`mst plan --max-length max`: the longest rows that fit, in each way to train."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.reference_models import LLAMA_2_7B, LLAMA_2_13B, QWEN_2_5_32B
from tests.reference_plans import planned

from mst.cli import main
from mst.cli.planning import show_longest
from mst.errors import PlanError
from mst.hardware import read_hardware
from mst.inputs import gather
from mst.longest import LengthLimit, LongestRows, longest_rows
from mst.model.facts import ModelFacts
from mst.registry import load
from mst.request import TrainRequest
from mst.shortfall import NothingFits
from mst.space import open_space
from mst.workload import DataFacts, packed


def half_labels(length: int, count: int = 64) -> DataFacts:
    return DataFacts((length,) * count, (length // 2,) * count, 0, None, length, length, 0)


def longest(
    model: ModelFacts,
    on: str,
    request: TrainRequest | None = None,
    data: DataFacts | None = None,
) -> LongestRows:
    where = read_hardware(on, load())
    asked = request or TrainRequest()
    rows = data or half_labels(100)
    return longest_rows(
        open_space(where.devices, where.capabilities, model, rows, asked, where.host_bytes)
    )


def as_request(limit: LengthLimit, request: TrainRequest) -> TrainRequest:
    made = limit.at.configuration
    stage = made.strategy if made.strategy.startswith("zero") else "off"
    return replace(
        request,
        tuner=made.tuner,
        optim=made.optim,
        gradient_checkpointing="on" if made.checkpointing else "off",
        activation_offloading="on" if made.activation_offloading else "off",
        per_device_train_batch_size=made.micro_batch,
        nproc_per_node=made.world_size,
        async_save="off",
        deepspeed=stage + ("" if made.offload == "none" else "_offload"),
    )


@pytest.mark.parametrize(
    ("model", "on", "request_"),
    [
        (LLAMA_2_7B, "rtx-3090", TrainRequest()),
        (LLAMA_2_7B, "a100-80gb:4", TrainRequest(memory_budget="20GB")),
        (LLAMA_2_13B, "rtx-3090:2+cpu-32c-256gb", TrainRequest()),
        (LLAMA_2_13B, "cpu-16c-64gb", TrainRequest(per_device_train_batch_size=2)),
        (QWEN_2_5_32B, "910a:8", TrainRequest()),
    ],
)
def test_the_plan_at_the_longest_fits_and_64_tokens_more_do_not(
    model: ModelFacts, on: str, request_: TrainRequest
) -> None:
    found = longest(model, on, request_)
    context = model.max_position_embeddings
    assert context is not None
    ended = [each for each in found.limits if 0 < each.max_length <= context - 64]

    assert ended
    for each in ended:
        # Compiled layers of a quantized model take a little more, where that fits.
        asked = replace(as_request(each, request_), torch_compile="off")
        made = planned(model, on, asked, half_labels(each.max_length))
        assert made.memory.peak_bytes == each.at.peak_bytes
        assert each.max_length % 64 == 0
        with pytest.raises(NothingFits):
            planned(model, on, asked, half_labels(each.max_length + 64))
    for each in found.limits:
        assert each.max_length <= context
        assert (each.max_length == 0) == bool(each.at.why_not)


def test_what_buys_length_is_seen() -> None:
    found = longest(LLAMA_2_7B, "rtx-3090")
    lengths = {
        (each.at.configuration.tuner, each.at.configuration.checkpointing): each.max_length
        for each in reversed(found.limits)
    }

    assert 0 < lengths["lora", False] < lengths["qlora", False] < lengths["qlora", True] == 4096
    assert lengths["lora", False] < lengths["lora", True]
    assert lengths["full", True] == 0
    assert [each.max_length for each in found.limits] == sorted(
        (each.max_length for each in found.limits), reverse=True
    )


def test_a_smaller_budget_and_a_larger_micro_batch_take_length_away() -> None:
    def most(request: TrainRequest) -> int:
        asked = replace(request, tuner="lora", gradient_checkpointing="off")
        return longest(LLAMA_2_7B, "rtx-3090", asked).limits[0].max_length

    free, bounded = most(TrainRequest()), most(TrainRequest(memory_budget="18GB"))

    assert 0 < bounded < free
    assert 0 < most(TrainRequest(per_device_train_batch_size=2)) < free
    assert most(TrainRequest(memory_budget="900GB")) == free


def test_the_length_of_the_rows_does_not_matter_but_their_labels_do() -> None:
    short = longest(QWEN_2_5_32B, "910a:8", data=half_labels(64))
    long = longest(QWEN_2_5_32B, "910a:8", data=half_labels(4096))
    few = longest(QWEN_2_5_32B, "910a:8", data=replace(half_labels(64), label_tokens=(1,) * 64))

    assert short == long
    assert (short.label_share, few.label_share) == (1 / 2, 1 / 64)
    assert short.limits[0].max_length < few.limits[0].max_length


def test_pairs_blocks_and_streams_have_limits_too() -> None:
    rows = half_labels(100)
    pairs = replace(rows, lengths=(200,) * 64, parts=((100, 100),) * 64, sequences=2)
    request = TrainRequest(tuner="lora", gradient_checkpointing="off")

    def most(data: DataFacts) -> int:
        return longest(LLAMA_2_7B, "rtx-3090", request, data).limits[0].max_length

    assert 0 < most(pairs) <= most(rows) / 2 + 64
    assert 0 < most(packed(rows, 512)) <= most(rows)
    assert most(replace(rows, sampled_from=10**6)) == most(rows)


def test_when_not_even_64_tokens_fit_the_error_says_what_would_do() -> None:
    with pytest.raises(PlanError, match=r"no plan for lora tuning .* What would do: "):
        longest(LLAMA_2_13B, "rtx-3090", TrainRequest(tuner="lora"))


@pytest.fixture
def arguments(tmp_path: Path, tiny_model: Path) -> list[str]:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"query": "Hello", "response": "Good day"}\n' * 40, encoding="utf-8")
    return ["--model", str(tiny_model), "--dataset", str(data), "--on", "cpu-4c-8gb"]


def test_mst_plan_prints_the_longest_as_json_and_as_a_table(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def limits(*more: str) -> list[dict[str, Any]]:
        assert main(["plan", *arguments, "--max-length", "max", "--json", *more]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["longest"]
        assert (found["context"], found["micro_batch"]) == (512, 1)
        return list(found["limits"])

    plain = ["--tuner", "lora", "--gradient-checkpointing", "off"]
    (whole,) = limits(*plain)
    # One megabyte less is had by a tighter heap, at the same length.
    bound = f"{whole['at']['peak_bytes'] / 1e6 - 5:.3f}MB"
    (less,) = limits(*plain, "--memory-budget", bound)
    all_ways = limits()

    assert whole["max_length"] == 512
    assert 0 < less["max_length"] < 512
    assert {each["at"]["configuration"]["tuner"] for each in all_ways} >= {"lora", "full"}
    assert {each["at"]["configuration"]["checkpointing"] for each in all_ways} == {True, False}
    fitting = ["plan", *arguments, *plain, "--max-length", str(less["max_length"])]
    assert main([*fitting, "--memory-budget", bound]) == 0
    capsys.readouterr()

    assert main(["plan", *arguments, *plain, "--cutoff-len", "max", "--memory-budget", bound]) == 0
    said = capsys.readouterr().out
    assert "assumed a micro-batch of 1 row of that length" in said
    assert "may be used (--memory-budget)" in said
    assert f"longest {less['max_length']} tokens" in said


def test_the_table_has_what_fits_and_under_it_the_tuners_that_never_do(
    tiny_model: Path, chat_rows: Path
) -> None:
    request = TrainRequest(model=str(tiny_model), dataset=(str(chat_rows),))
    inputs = gather(request, {}, on="rtx-3090:2")
    console = Console(width=90, file=io.StringIO(), record=True)
    show_longest(console, inputs, longest(LLAMA_2_7B, "rtx-3090:2"))
    lines = console.export_text().splitlines()
    heading = next(n for n, line in enumerate(lines) if line.startswith("max_length"))
    table = [line.split() for line in lines[heading + 1 : lines.index("", heading)]]

    assert lines[heading].split()[-2:] == ["ended", "by"]
    assert "host" not in lines[heading]
    assert {row[1] for row in table} == {"lora", "qlora"}
    assert {(row[0], row[-1]) for row in table} > {("4096", "context")}
    assert {row[-1] for row in table if row[0] != "4096"} == {"memory"}
    assert any(line.startswith("full does not fit with rows of any length: ") for line in lines)


def test_a_budget_beyond_what_is_free_is_told_of(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["--max-length", "max", "--tuner", "lora", "--memory-budget", "80GB", "--json"]
    assert main(["plan", *arguments, *request]) == 0
    bound = json.loads(capsys.readouterr().out)["longest"]["bound"]

    assert bound.startswith("--memory-budget 80GB is more than there is: of the 7.84 GiB free, ")


def test_max_is_for_plans_alone_and_for_no_shown_plan(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tune.yaml"
    file.write_text("max_length: max\n", encoding="utf-8")

    for command in (["train", "--max-length", "max"], ["train", str(file)], ["plan", str(file)]):
        assert main(command) == 2
        assert "`mst plan --max-length max`" in capsys.readouterr().err
    assert main(["plan", *arguments, "--max-length", "max", "--compare"]) == 2
    assert "--compare was given with --max-length max" in capsys.readouterr().err
