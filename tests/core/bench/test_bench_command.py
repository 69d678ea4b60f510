"""`mst bench` measures real runs: their figures, a device that isn't here, one that hangs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.simulated import simchip_environment

from mst.bench.result_file import read_results
from mst.bench.results import Measured, Results
from mst.bench.store import MEASURED
from mst.errors import EXIT_FAILED

MATRIX = """
name: tiny
models: [{model}]
dataset: {rows}
methods: [lora, {{name: too large, tuner: full, memory_budget: 1MB}}]
lengths: [64]
batches: [2]
devices: [cpu, ascend]
exports: [merged]
serving: [2]
steps: 3
warm_up: 1
repeats: 2
prompt_words: 8
answer_tokens: 4
options: {{threads: 1}}
"""


def bench(
    *arguments: object, cwd: Path, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mst", "bench", *map(str, arguments)],
        env=(environ or os.environ) | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
    )


@pytest.fixture(scope="module")
def measured(
    tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The directory of a bench of the tiny model, and what its command said."""
    place = tmp_path_factory.mktemp("bench")
    (place / "matrix.yaml").write_text(MATRIX.format(model=tiny_model, rows=chat_rows))
    done = bench(
        "matrix.yaml", "--output-dir", "out", "--predict", "a100-80gb", "--html", "page.html",
        cwd=place,
    )  # fmt: skip
    return place, done


def by_status(results: Results) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = {}
    for each in results.cells:
        found.setdefault(each.status, []).append(each)
    return found


def test_each_cell_has_what_a_reader_needs(
    measured: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    place, done = measured
    found = by_status(read_results(place / "out"))
    one = found["done"][0]
    served = one.served

    assert done.returncode == 0, done.stdout + done.stderr
    assert {status: len(each) for status, each in found.items()} == {
        "done": 1, "does not fit": 1, "absent": 2, "forecast": 2,
    }  # fmt: skip
    assert [len(each.step_seconds) for each in one.repeats] == [3, 3]
    # The same seed: a fast wrong result would show.
    assert one.repeats[0].loss == one.repeats[1].loss
    assert one.repeats[0].eval_loss is not None
    assert one.repeats[0].peak_memory_bytes > 2**27
    assert one.forecast is not None
    assert one.forecast.memory_bytes > 2**27
    assert (one.setting and one.setting.micro_batch, one.setting and one.setting.threads) == (2, 1)
    assert one.peak.measured_tflops, one.peak.reason
    assert one.flop_per_token
    assert one.jail.endswith("namespace") or one.jail in ("broker", "seccomp")
    assert [(each.format, each.status) for each in one.exported] == [("merged", "passed")]
    assert one.exported[0].perplexity_ratio == pytest.approx(1, abs=0.05)
    assert [(each.target, each.streams, each.lost) for each in served] == [
        ("run", 2, 0), ("merged", 2, 0),
    ]  # fmt: skip
    assert all(each.tokens_per_second for each in served)
    assert one.energy_reason or one.repeats[0].energy_joules
    assert one.machine is not None
    assert (one.machine.device, one.versions["torch"] != "") == ("cpu:0", True)
    # What was measured on is gone; the results and the logs of the peak stay.
    assert not (place / "out" / "cells").exists()


def test_what_was_not_measured_says_why(
    measured: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    place, done = measured
    found = by_status(read_results(place / "out"))
    expected = found["forecast"][0]

    assert "memory" in found["does not fit"][0].reason
    assert "no 'ascend' device" in found["absent"][0].reason
    assert expected.machine is not None
    assert expected.machine.chip == "NVIDIA A100-SXM4-80GB"
    assert expected.forecast is not None
    assert expected.forecast.tokens_per_second
    assert "forecast, not measured" in done.stdout
    assert "4 of 4 cells" in done.stdout
    assert "Tokens a second, forecast" in (place / "page.html").read_text()


def test_a_bench_goes_on_where_it_was_left(
    measured: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    place, _ = measured
    before = (place / "out" / MEASURED).read_text().splitlines()
    again = bench("matrix.yaml", "--output-dir", "out", "--json", cwd=place)
    after = (place / "out" / MEASURED).read_text().splitlines()

    assert again.returncode == 0, again.stderr
    # Only the device that was not here is looked for again.
    assert len(after) == len(before) + 2
    assert after[: len(before)] == before
    assert len(json.loads(again.stdout)["cells"]) == 4


def test_a_cell_that_hangs_is_ended_and_the_next_goes_on(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    text = MATRIX.format(model=tiny_model, rows=chat_rows) + "timeout_seconds: 0.5\n"
    # One that can't fit is refused sooner than that.
    text = re.sub("methods: .*", "methods: [lora, full]", text)
    (tmp_path / "matrix.yaml").write_text(text.replace("[cpu, ascend]", "[cpu]"))
    done = bench("matrix.yaml", "--output-dir", "out", cwd=tmp_path)
    statuses = [each.status for each in read_results(tmp_path / "out").cells]

    assert done.returncode == EXIT_FAILED
    assert statuses == ["timeout"] * 2
    assert "ended after" in done.stdout


def test_a_cell_that_runs_out_of_memory_is_marked_and_the_next_goes_on(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    text = MATRIX.format(model=tiny_model, rows=chat_rows) + "packing: false\n"
    text = text.replace("[cpu, ascend]", "[simchip, ascend]")
    (tmp_path / "matrix.yaml").write_text(re.sub("methods: .*", "methods: [lora]", text))
    # The chip promises 4 GiB and has 2 MiB.
    environ = simchip_environment(fault="capacity:0.0005")
    done = bench("matrix.yaml", "--output-dir", "out", cwd=tmp_path, environ=environ)
    found = read_results(tmp_path / "out").cells

    # It says something about the chip, so the command has not failed.
    assert done.returncode == 0, done.stdout + done.stderr
    assert [each.status for each in found] == ["out of memory", "absent"]
    assert "simchip:0 ran out of memory" in found[0].reason
