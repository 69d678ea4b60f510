"""A comparison tells what got worse by more than the noise, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.measured_cells import A100, GIB, cell, failed, forecast, measured, repeat, results

from mst import cli
from mst.bench.compare import compare, ratio_interval
from mst.bench.result_file import write_results
from mst.bench.results import Measured
from mst.errors import EXIT_FAILED, EXIT_USAGE

QUIET = (1000.0, 1005.0, 995.0)


def worse(old: Measured, new: Measured, tolerance: float = 0.03) -> list[str]:
    found = compare(results(old), results(new), tolerance)
    return [each.figure for each in found.regressions]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (QUIET, (900.0, 905.0, 895.0), ["tokens/s"]),
        (QUIET, (1100.0, 1105.0, 1095.0), []),
        # Within the tolerance, however sure.
        (QUIET, (980.0, 985.0, 975.0), []),
        # As much slower in the middle, but from run to run by as much again.
        ((1000.0, 850.0, 1150.0), (900.0, 800.0, 1100.0), []),
        # One run that was disturbed does not make the cell slower.
        (QUIET, (1000.0, 600.0, 1005.0), []),
    ],
)
def test_speed_is_worse_beyond_noise_and_tolerance(
    before: tuple[float, ...], after: tuple[float, ...], told: list[str]
) -> None:
    assert worse(measured(before), measured(after)) == told


def test_a_lower_tolerance_tells_more() -> None:
    assert worse(measured(QUIET), measured((980.0, 985.0, 975.0)), 0.005) == ["tokens/s"]


def test_the_interval_holds_the_true_ratio_and_narrows_with_repeats() -> None:
    old, new = [repeat(each) for each in QUIET], [repeat(each * 0.9) for each in QUIET]
    low, high = ratio_interval(old, new)
    noisy = [repeat(each * 0.9, jitter=0.2) for each in QUIET]
    wider = ratio_interval(old, noisy)

    assert low < 0.9 < high
    assert high - low < 0.04
    assert wider[1] - wider[0] > high - low
    assert ratio_interval(old, new) == (low, high)


def test_one_repeat_is_compared_with_a_word_of_warning() -> None:
    found = compare(results(measured((1000.0,))), results(measured((900.0,))))

    assert found.changes[0].worse
    assert "one repeat each" in found.changes[0].note


@pytest.mark.parametrize(
    ("change", "figure"),
    [
        ({"peak_memory_bytes": int(3.5 * GIB)}, "memory"),
        ({"eval_loss": 2.9}, "eval loss"),
    ],
)
def test_a_fast_wrong_result_shows(change: dict[str, Any], figure: str) -> None:
    new = measured(repeats=tuple(repeat(1500.0, **change) for _ in QUIET))

    assert worse(measured(QUIET), new) == [figure]


def test_a_loss_that_is_no_number_any_longer_is_worse() -> None:
    gone = measured(repeats=tuple(repeat(eval_loss=float("nan")) for _ in QUIET))

    assert worse(measured(QUIET), gone) == ["eval loss"]
    assert worse(gone, gone) == []
    assert worse(gone, measured(QUIET)) == []


def test_without_rows_held_out_the_training_loss_is_compared() -> None:
    old = measured(repeats=(repeat(eval_loss=None),))
    new = measured(repeats=(repeat(eval_loss=None, loss=2.6),))

    assert worse(old, new) == ["loss"]


def test_a_cell_that_can_not_be_measured_any_longer_is_worse() -> None:
    gone = failed("out of memory", "step 1")

    assert worse(measured(), gone) == ["status"]
    assert worse(gone, measured()) == []
    assert worse(gone, gone) == []


def test_only_the_same_cell_of_the_same_chip_is_compared() -> None:
    old = results(measured(), forecast())
    new = results(measured((1.0,), machine=A100), measured((1.0,), cell=cell(length=64)))
    found = compare(old, new)

    assert found.changes == ()
    assert (len(found.only_old), len(found.only_new)) == (1, 2)


def test_the_command_ends_with_1_where_figures_got_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    write_results(old, results(measured(QUIET)))
    write_results(new, results(measured((800.0, 805.0, 795.0))))
    log = ["--audit-log", str(tmp_path / "audit")]
    codes = [
        cli.main(["bench", "show", str(one), "--compare", str(other), *log])
        for one, other in ((new, old), (old, new), (new, new))
    ]
    told = capsys.readouterr().out
    odd = cli.main(["bench", "show", str(new), "--compare", str(old), "--tolerance", "2", *log])
    lost = cli.main(["bench", "show", str(new), "--compare", str(tmp_path / "none"), *log])

    assert codes == [EXIT_FAILED, 0, 0]
    assert "WORSE" in told
    assert "1 figures got worse by more than the noise" in told
    assert (odd, lost) == (EXIT_USAGE, EXIT_FAILED)
