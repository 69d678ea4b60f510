"""What the training benchmark makes of its rounds, and when it refuses to run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from benchmarks import train_throughput
from benchmarks.step_profile import by_kind, table
from benchmarks.train_task import RANK, Task, prepared_rows, rows_of_steps
from benchmarks.train_throughput import arithmetic, parsed, quiet_or_leave, scaling, summed_up


def side(speed: float, losses: list[float], **more: Any) -> dict[str, Any]:
    return {
        "tokens_per_second": speed, "answer_tokens_per_second": speed / 10, "step_seconds": 1.0,
        "mfu": 0.3, "product_tflops": 0.4, "peak_rss_bytes": 2.0**30, "compile_seconds": 0.0,
        "losses": losses, "version": "",
    } | more  # fmt: skip


def test_ratios_are_medians_over_rounds_in_which_both_sides_ran() -> None:
    # The machine slows down by half from round to round; in the last the second side suffers more.
    rounds = [
        {
            "mst": side(100 / n, [2.0, 1.5]),
            "trl": side(50 / n / (3 if n == 4 else 1), [2.0, 1.25], version="trl 1"),
        }
        for n in (1, 2, 4)
    ]
    found = summed_up(rounds, {"reference": [2.0, 1.375]}, ("mst", "trl"))

    assert found["tokens_per_second_ratio_to_trl"] == 2.0
    assert found["tokens_per_second"] == {"mst": 50.0, "trl": 25.0}
    assert found["largest_loss_difference_to_float32"] == {"mst": 0.125, "trl": 0.125}
    assert found["versions"] == {"trl": "trl 1"}


def test_more_rows_are_as_fast_by_arithmetic_and_longer_ones_slower_by_their_attention(
    tiny_model: Path,
) -> None:
    lines: list[dict[str, Any]] = []
    for name, (rows, length, times) in train_throughput.MADE_UP.items():
        task = Task(None, "float32", rows, length, 2 + 5 * times, 1)
        line: dict[str, Any] = {
            "rows": name,
            "threads": 1,
            "tokens_per_second": {"mst": 1000 / length},
        }
        # Others were there while the long rows ran.
        line["tokens_per_processor_second"] = {"mst": 1.0 if length == 128 else 0.95}
        lines.append(line | arithmetic(tiny_model, task))
    found = scaling(lines, ("mst",))["scaling"]
    for line in lines:
        line["threads"] = 2
    by_the_clock = scaling(lines, ("mst",))["scaling"]
    first, _, longer = lines

    assert {each["tokens_a_step"] for each in lines} == {2048}
    assert found["rows8"]["arithmetic"] == 1.0
    assert found["rows8"]["mst"] == {
        "measured": 1.0, "by": "tokens_per_processor_second", "over_arithmetic": 1.0,
        "within_a_tenth": True,
    }  # fmt: skip
    assert found["length8"]["mst"]["measured"] == 0.95
    assert by_the_clock["length8"]["mst"]["measured"] == 0.125
    assert not by_the_clock["length8"]["mst"]["within_a_tenth"]
    assert longer["attention_flop"] == 8 * first["attention_flop"]
    whole = (each["products_flop"] + each["attention_flop"] for each in (first, longer))
    assert found["length8"]["arithmetic"] == pytest.approx(next(whole) / next(whole), abs=1e-3)


def test_nothing_is_held_against_float32_where_there_is_no_such_run() -> None:
    found = summed_up([{"mst": side(1.0, [2.0])}], {}, ("mst",))

    assert "largest_loss_difference_to_float32" not in found


def test_made_up_rows_have_one_length_and_are_the_same_for_all_sides(tiny_model: Path) -> None:
    task = Task(None, "float32", 2, 16, 3, 1)
    one, two = (rows_of_steps(prepared_rows(tiny_model, task), task) for _ in range(2))

    assert [list(each.input_ids) for each in one] == [list(each.input_ids) for each in two]
    assert {len(each.input_ids) for each in one} == {16}
    assert {sum(label != -100 for label in each.labels) for each in one} == {4}
    assert len(one) == 6


def test_a_busy_machine_is_refused_unless_its_lines_may_be_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_throughput, "busy_share", lambda: 0.5)

    assert quiet_or_leave(allowed=True) == 0.5
    with pytest.raises(SystemExit, match=r"others use 50% of this machine's cores .*--busy-ok"):
        quiet_or_leave(allowed=False)


def test_a_profile_tells_kinds_of_work_apart() -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from mst.training.block_attention import block_attention

    hidden, weight, adapter, head = (torch.randn(64, width) for width in (64, 96, RANK, 512))
    query = torch.randn(1, 64, 2, 32).transpose(1, 2).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as kept:
        (hidden @ weight).mul_(2).bfloat16()
        hidden @ adapter
        torch.log_softmax(hidden @ head, -1)
        block_attention(query, query, query, None, 0.2).sum().backward()
    events = [each for each in kept.events() if each.self_cpu_time_total]
    found = by_kind(events, 512)

    assert {
        "attention", "loss: output head, softmax", "adapters' products", "frozen weights' products",
        "casts and copies", "all else, element by element",
    } == set(found)  # fmt: skip
    # Its own products are attention's, forward and back.
    assert found["attention"] > sum(
        each.self_cpu_time_total for each in events if each.name == "aten::bmm"
    )
    assert found.total() == pytest.approx(sum(each.self_cpu_time_total for each in events))
    assert table(events, 512, 1).splitlines()[2].startswith("| ")


def test_peers_run_only_where_their_interpreter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(*words: str) -> argparse.Namespace:
        monkeypatch.setattr("sys.argv", ["train_throughput", *words])
        return parsed()

    assert given().sides == ["mst", "mst-plain", "trl", "trl-packed"]
    peers = given("--llamafactory", "/peer/bin/python").sides[-2:]
    assert peers == ["llamafactory", "llamafactory-packed"]
    assert given("--ms-swift", "a", "--unsloth", "b").sides[-2:] == ["ms-swift", "unsloth"]
    with pytest.raises(SystemExit):
        given("--sides", "mst", "llamafactory")
    with pytest.raises(SystemExit):
        given("--profile", "trace.json", "--sides", "trl")
