"""Figures of a cell: from a run's own files, from counters that wrap, and against peaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.measured_cells import A100, SETTING, cell, failed, forecast, measured, repeat

from mst import rundir
from mst.bench import figures
from mst.bench.figures import Prices
from mst.bench.meters import EnergyMeter, busy_share, consumed
from mst.bench.process import Ended, Steps, error_in, run_watched
from mst.bench.run_cell import outcome
from mst.errors import EXIT_OUT_OF_MEMORY
from mst.facts import Telemetry
from mst.versions import commit

KEPT = {"PATH": "/usr/bin:/bin"}


def test_a_run_gives_its_figures_without_its_warm_up(finished_run: Path) -> None:
    lines = [each for each in rundir.read_metrics(finished_run) if "loss" in each]
    found = figures.repeat_of(finished_run, 1, 12.0)

    assert len(found.step_seconds) == 3
    assert found.tokens == lines[-1]["tokens"] - lines[0]["tokens"]
    assert found.loss == lines[-1]["loss"]
    assert found.eval_loss == rundir.read_manifest(finished_run).results["last_eval_loss"]
    # What the loop itself says of all steps lies between the slowest and the fastest of them.
    rates = [each["tokens_per_second"] for each in lines[1:]]
    assert min(rates) * 0.99 < found.tokens_per_second < max(rates) * 1.01


def test_operations_of_a_token_are_counted_from_the_runs_own_model(finished_run: Path) -> None:
    manifest = rundir.read_manifest(finished_run)
    found = figures.flop_per_token(finished_run, manifest)
    # Two layers of 64 × (64 + 32 + 32 + 64) and 3 × 64 × 128 weights, 4 operations each forward
    # and back as they are frozen; the head only where there are labels.
    body = 4 * 2 * (64 * 192 + 3 * 64 * 128)
    head = 4 * 6400 * 64

    assert 0 < manifest.results["label_share"] < 1
    assert found is not None
    assert body + head * manifest.results["label_share"] < found < 1.3 * (body + head)


def test_a_batch_that_the_data_cannot_fill_is_told_of(finished_run: Path) -> None:
    plan = figures.machine_plan(finished_run)
    last = repeat(steps=4)  # of 2,000 tokens each
    few, many = replace(plan, steps_per_epoch=1), replace(plan, steps_per_epoch=2)
    short, long = (cell(length=length) for length in (256, 512))
    by_rows = cell(packing=False)

    # A step of the run takes 8 of its 32 rows.
    assert [figures.rows_lacking(each, few, last) for each in (short, by_rows)] == ["", ""]
    assert "all 2,000 tokens that there are" in figures.rows_lacking(long, few, last)
    assert figures.rows_lacking(long, many, last) == ""
    assert "all 7 rows" in figures.rows_lacking(by_rows, replace(few, train_rows=7), last)


def test_a_run_of_another_mst_has_no_mfu(finished_run: Path) -> None:
    manifest = rundir.read_manifest(finished_run)
    results = {name: one for name, one in manifest.results.items() if name != "label_share"}

    assert figures.flop_per_token(finished_run, replace(manifest, results=results)) is None
    assert figures.mfu(measured(flop_per_token=None), 1.0) is None
    assert figures.mfu(measured(), None) is None


def test_mfu_is_of_all_devices_together() -> None:
    two = measured(setting=replace(SETTING, world_size=2))

    assert figures.mfu(measured(), 1.0) == pytest.approx(1000 * 4e8 / 1e12, rel=0.01)
    assert figures.mfu(two, 1.0) == pytest.approx(500 * 4e8 / 1e12, rel=0.01)


def test_a_million_tokens_cost_hours_and_electricity() -> None:
    joules = [repeat(1000.0, energy_joules=500.0)]
    each = measured(repeats=tuple(joules))
    prices = Prices({"cpu": 0.36, "epyc": 0.72}, kwh=0.5)

    # A million tokens take 1,000 s; the longest name that fits wins.
    assert figures.million_tokens_cost(measured(), prices) == pytest.approx(0.2, rel=0.02)
    assert figures.million_tokens_kwh(each) == pytest.approx(500 / 8_000 * 1e6 / 3.6e6)
    assert figures.million_tokens_cost(each, prices) == pytest.approx(0.2 + 0.5 * 0.01736, rel=0.02)
    assert figures.million_tokens_cost(measured(machine=A100), prices) is None
    assert figures.million_tokens_cost(forecast(), Prices({"a100": 3.6})) == pytest.approx(0.05)
    assert figures.million_tokens_cost(failed("timeout", "hung"), prices) is None
    assert figures.million_tokens_kwh(measured()) is None


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [
        (Telemetry(energy_joules=10.0), Telemetry(energy_joules=25.0), 15.0),
        (
            Telemetry(energy_joules=990.0, energy_wraps_joules=1000.0),
            Telemetry(energy_joules=5.0, energy_wraps_joules=1000.0),
            15.0,
        ),
        (Telemetry(energy_joules=990.0), Telemetry(energy_joules=5.0), None),
        (Telemetry(power_watts=100.0), Telemetry(power_watts=200.0), 300.0),
        (Telemetry(power_watts=100.0), Telemetry(reason="lost"), None),
    ],
)
def test_energy_between_two_readings(
    before: Telemetry, after: Telemetry, joules: float | None
) -> None:
    assert consumed(before, after, 2.0) == joules


def test_a_meter_adds_up_from_its_beginning_and_keeps_the_heat() -> None:
    told: Iterator[Telemetry] = iter(
        [
            Telemetry(energy_joules=100.0, temperature_celsius=50.0),
            Telemetry(energy_joules=130.0, temperature_celsius=71.0, throttled=("heat",)),
            Telemetry(energy_joules=170.0, temperature_celsius=60.0, throttled=("heat",)),
        ]
    )
    meter = EnergyMeter(lambda: next(told))
    meter.begin()
    meter.read()
    meter.read()

    assert (meter.joules, meter.hottest, meter.throttled) == (70.0, 71.0, ["heat"])


def test_energy_of_steps_that_are_over_before_they_are_seen_is_not_known() -> None:
    told = iter([Telemetry(energy_joules=each) for each in (100.0, 100.5)])
    meter = EnergyMeter(lambda: next(told))
    meter.begin()
    time.sleep(0.02)
    meter.read()

    assert meter.covers(meter.seconds)
    assert meter.covers(meter.seconds * 1.05)
    assert not meter.covers(0.2)


def test_a_device_that_counts_nothing_says_why_and_is_not_asked_again() -> None:
    meter = EnergyMeter(lambda: Telemetry(reason="no RAPL driver"))
    meter.begin()
    meter.read()

    assert (meter.joules, meter.reason, meter.due()) == (None, "no RAPL driver", False)


def test_how_busy_a_machine_is_is_read_from_its_kernel(tmp_path: Path) -> None:
    assert 0 <= busy_share(0.05) <= 1
    assert busy_share(0.0, tmp_path / "none") == 0.0


def test_the_commit_of_a_checkout_is_found_without_git() -> None:
    found = commit()

    assert found == "" or (len(found) == 40 and set(found) <= set("0123456789abcdef"))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("note\nNothingFits: 8 GiB are needed.\n", ("NothingFits", "8 GiB are needed.")),
        ("killed\n", ("", "killed")),
        ("", ("", "")),
    ],
)
def test_the_error_of_a_command_is_its_last_line(text: str, error: tuple[str, str]) -> None:
    assert error_in(text) == error


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (Ended(0, 1.0, False, "", "", ""), "done"),
        (Ended(143, 60.0, True, "", "", ""), "timeout"),
        (Ended(EXIT_OUT_OF_MEMORY, 1.0, False, "OutOfMemory", "step 3", ""), "out of memory"),
        (Ended(1, 1.0, False, "NothingFits", "8 GiB", ""), "does not fit"),
        (Ended(1, 1.0, False, "NoDeviceError", "no cuda", ""), "absent"),
        (Ended(1, 1.0, False, "PlanError", "no nf4 here", ""), "refused"),
        (Ended(1, 1.0, False, "DataError", "no row", ""), "failed"),
        (Ended(137, 1.0, False, "", "", ""), "failed"),
    ],
)
def test_how_a_run_ended_is_its_cells_status(tmp_path: Path, ended: Ended, status: str) -> None:
    assert outcome(ended, tmp_path)[0] == status


def test_a_run_that_the_kernel_killed_ran_out_of_memory(finished_run: Path, tmp_path: Path) -> None:
    import shutil

    run = shutil.copytree(finished_run, tmp_path / "run")
    miss = rundir.ForecastMiss(0, 8, False, 1, None, None, "killed", rundir.now())
    rundir.add_miss(run, miss)

    assert outcome(Ended(1, 1.0, False, "RunError", "killed", ""), run)[0] == "out of memory"


@pytest.fixture
def watched(tmp_path: Path) -> Callable[..., Ended]:
    """Return a function that runs a shell command under watch."""

    def run(script: str, timeout: float = 30.0) -> Ended:
        return run_watched(["bash", "-c", script], tmp_path / "log", KEPT, timeout)

    return run


def test_a_command_that_hangs_is_ended_with_all_that_it_started(
    watched: Callable[..., Ended], tmp_path: Path
) -> None:
    # The second process takes no notice of being asked.
    beside = f"bash -c 'trap \"\" TERM; echo $$ > {tmp_path}/pid; sleep 60' & "
    found = watched(f"{beside} sleep 60", timeout=0.6)
    beside_it = Path("/proc", (tmp_path / "pid").read_text().strip())
    until = time.monotonic() + 10
    while beside_it.exists() and time.monotonic() < until:
        time.sleep(0.05)

    assert found.late
    assert found.seconds < 15
    assert not beside_it.exists()


def test_a_command_that_fails_says_by_what(watched: Callable[..., Ended]) -> None:
    found = watched("echo out; echo 'DataError: no row' >&2; exit 3")

    assert (found.code, found.error, found.message) == (3, "DataError", "no row")
    assert (found.output, found.late) == ("out\n", False)


def test_steps_are_told_as_their_lines_become_whole(tmp_path: Path) -> None:
    told: list[int] = []
    steps = Steps(tmp_path, told.append)
    steps.look()
    file = tmp_path / rundir.METRICS
    file.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    steps.look()
    with file.open("a") as more:
        more.write('ss": 2.4}\n{"step": 2, "eval_loss": 2.6}\n')
    steps.look()

    assert told == [1, 2]
