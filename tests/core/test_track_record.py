"""The forecast's own record, read from run directories."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.reference_models import SMOLLM2_135M

from mst import cli, rundir
from mst.facts import Capabilities, DeviceFacts
from mst.plan import Plan
from mst.planner import plan
from mst.request import TrainRequest
from mst.rundir import ForecastMiss, RunManifest
from mst.track_record import entries, summary
from mst.workload import DataFacts

GIB = 2**30


@pytest.fixture(scope="module")
def made() -> Plan:
    cpu = DeviceFacts("cpu", 0, "a CPU", "x86_64", 64 * GIB, 64 * GIB, ("float32",), 4)
    rows = DataFacts((64,) * 64, (30,) * 64, 0, None, 64, 64, 0)
    able = Capabilities("cpu", "gloo", attention=("sdpa",))
    return plan("cpu", (cpu,), (able,), {}, SMOLLM2_135M, rows, TrainRequest())


def write_run(
    directory: Path, name: str, plan: Plan, measured: float | None, *misses: ForecastMiss
) -> None:
    path = directory / name
    path.mkdir()
    results = {} if measured is None else {
        "peak_memory_bytes": measured, "predicted_memory_bytes": 1.0 * GIB, "step_seconds": 2.0,
    }  # fmt: skip
    manifest = RunManifest(
        "done", "0", {}, "m", "m", "0", (), (), rundir.now(), results=results, misses=misses
    )
    rundir.write_document(path, rundir.PLAN, plan)
    rundir.write_document(path, rundir.MANIFEST, manifest)


def test_forecasts_are_judged_by_the_runs_that_were_measured(made: Plan, tmp_path: Path) -> None:
    miss = ForecastMiss(1, 16, False, GIB, None, 2 * GIB, "killed", rundir.now())
    write_run(tmp_path, "a", made, 1.25 * GIB)
    write_run(tmp_path, "b", made, 0.8 * GIB, miss)
    write_run(tmp_path, "c", made, None)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / rundir.MANIFEST).write_text("{")
    found = entries(tmp_path)
    told = summary(found)

    assert [(each.run, each.missed) for each in found] == [
        ("a", False), ("b", True), ("b", False)
    ]  # fmt: skip
    assert (told.runs, told.misses) == (2, 1)
    assert told.median_error == pytest.approx((0.2 + 0.25) / 2)
    assert told.worst_under == pytest.approx(0.2)


def test_forecasts_that_were_never_too_low_say_zero(made: Plan, tmp_path: Path) -> None:
    write_run(tmp_path, "a", made, 0.5 * GIB)

    assert summary(entries(tmp_path)).worst_under == 0


def test_the_report_is_printed_and_is_json(
    made: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, "a", replace(made, time=None), 1.25 * GIB)
    shown = cli.main(["plan", "--report", str(tmp_path)]), capsys.readouterr().out
    plain = cli.main(["plan", "--report", str(tmp_path), "--json"]), capsys.readouterr().out

    assert shown[0] == plain[0] == 0
    assert "1 runs: median error 20.0%, at the most 20.0% too low" in " ".join(shown[1].split())
    assert json.loads(plain[1])["summary"]["runs"] == 1


def test_a_directory_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["plan", "--report", "no-such-place"])

    assert code == 2
    assert "no-such-place: no such directory" in capsys.readouterr().err
