"""The list of runs and their curves: read again when they change, and no more than that."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from mst import rundir
from mst.ui import index as module
from mst.ui.index import Index, id_of, newest_figures
from mst.ui.tails import Series, Tail, Tails, thinned


@pytest.fixture(autouse=True)
def always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FRESH_SECONDS", 0.0)


def append(run: Path, *lines: object) -> None:
    with (run / rundir.METRICS).open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in lines)


def test_the_newest_run_stands_first_and_what_is_none_is_left_out(runs: Path) -> None:
    found = Index([runs]).entries()

    assert [(each.summary.name, each.summary.state) for each in found] == [
        ("killed", "killed"), ("second", "done"), ("first", "done"), ("torn", "damaged"),
    ]  # fmt: skip
    assert {each.id for each in found} == {id_of(each.path) for each in found}
    assert str(runs) not in "".join(each.id for each in found)


def test_a_run_is_read_again_only_when_it_changes(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, whole = Index([runs]), rundir.read_manifest
    read: list[str] = []

    def noting(path: Path) -> rundir.RunManifest:
        read.append(path.name)
        return whole(path)

    monkeypatch.setattr(rundir, "read_manifest", noting)
    index.entries()
    first = list(read)
    index.entries()

    assert sorted(read) == sorted(first) == ["first", "killed", "second", "torn"]
    rundir.update_manifest(runs / "first", status="failed", error="it broke")
    read.clear()
    found = {each.summary.name: each.summary for each in index.entries()}
    assert set(read) <= {"first"}
    assert (found["first"].state, found["first"].problem) == ("failed", "it broke")


def test_a_run_that_goes_on_is_told_from_a_killed_one_by_its_lock(runs: Path) -> None:
    index = Index([runs])
    name = id_of(runs / "killed")

    assert index.find(name).summary.state == "killed"  # type: ignore[union-attr]
    with rundir.take_lock(runs / "killed"):
        assert index.find(name).summary.state == "running"  # type: ignore[union-attr]


def test_the_list_has_the_newest_losses(runs: Path) -> None:
    index = Index([runs])
    index.entries()
    append(runs / "killed", {"step": 5, "loss": 0.25, "tokens_per_second": 7.0})
    append(runs / "killed", {"step": 5, "eval_loss": 0.125})
    found = index.find(id_of(runs / "killed"))

    assert found is not None
    summary = found.summary
    assert (summary.steps, summary.loss, summary.eval_loss) == (5, 0.25, 0.125)
    assert summary.tokens_per_second == 7.0


def test_a_run_that_vanishes_is_gone_and_a_link_leads_nowhere(runs: Path, tmp_path: Path) -> None:
    index = Index([runs, tmp_path / "not-there"])
    index.entries()
    shutil.move(runs / "first", tmp_path / "elsewhere")
    (runs / "linked").symlink_to(tmp_path / "elsewhere")

    assert index.find(id_of(runs / "first")) is None
    assert index.find(id_of(runs / "linked")) is None
    assert index.find("0" * 24) is None
    assert {each.summary.name for each in index.entries()} == {"second", "killed", "torn"}


def test_only_what_is_new_is_read(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tail = Tail(runs / "first")
    tail.read()
    before = tail.whole(100)
    size = (runs / "first" / rundir.METRICS).stat().st_size
    append(runs / "first", {"step": 5, "loss": 0.5, "learning_rate": 1e-4})
    with (runs / "first" / rundir.METRICS).open("a") as file:
        file.write('{"step": 6, "lo')  # being written
    tail.read()
    grown = tail.since(before, 100)

    assert before.sizes["loss"] == 4
    assert grown.points == {"loss": ([5], [0.5]), "learning_rate": ([5], [1e-4])}
    assert (grown.generation, grown.damaged) == (before.generation, 0)
    assert tail._offset < (runs / "first" / rundir.METRICS).stat().st_size
    assert tail._offset > size


def test_a_curve_that_was_written_anew_replaces_what_was_shown(runs: Path) -> None:
    tail = Tail(runs / "first")
    tail.read()
    before = tail.whole(100)
    # What `mst train --resume` does to steps behind its checkpoint.
    with rundir.metrics_writer(runs / "first", after_step=2):
        pass
    tail.read()
    grown = tail.since(before, 100)

    assert grown.generation == before.generation + 1
    assert grown.points["loss"][0] == [1, 2]


def test_no_point_is_lost_between_two_who_look(runs: Path) -> None:
    tail = Tail(runs / "first")
    tail.read()
    told = tail.whole(100)
    # Another page's look, between this one's and its next.
    append(runs / "first", {"step": 5, "loss": 0.5})
    tail.read()
    tail.whole(100)

    assert tail.since(told, 100).points == {"loss": ([5], [0.5])}


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    (tmp_path / rundir.METRICS).write_bytes(
        b'{"step": 1, "loss": 3.0}\n3\n\xff\xfe\n{"step": "x", "loss": 1}\n'
        b'{"step": 2, "loss": NaN}\n{"step": 3, "loss": 2.0, "tokens": true}\n'
        b'{"step": 2, "loss": 1.0}\n[[[[\n{"step": 1e999}\n'
    )
    tail = Tail(tmp_path)
    tail.read()
    whole = tail.whole(100)

    assert whole.points == {"loss": ([1, 3], [3.0, 2.0])}
    assert whole.damaged == 6
    assert newest_figures(tmp_path)["loss"] == 1.0


def test_a_line_without_end_costs_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mst.ui.tails._BLOCK", 1000)
    (tmp_path / rundir.METRICS).write_bytes(
        b'{"step": 1, "loss": 3.0}\n' + b"x" * 5000 + b'\n{"step": 2, "loss": 2.0}\n'
    )
    tail = Tail(tmp_path)
    tail.read()

    assert tail.whole(100).points == {"loss": ([1, 2], [3.0, 2.0])}
    assert tail.damaged


def test_a_thinned_curve_keeps_its_spikes_and_its_ends() -> None:
    series = Series()
    for step in range(10_000):
        series.steps.append(step)
        series.values.append(50.0 if step == 4321 else -1.0 if step == 777 else step / 10_000)
    steps, values = thinned(series, 600)

    assert len(steps) <= 600
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 9999)
    assert (max(values), min(values)) == (50.0, -1.0)
    assert thinned(series, 20_000)[0] == list(range(10_000))


def test_curves_that_nobody_looks_at_are_forgotten(tmp_path: Path) -> None:
    tails = Tails()
    first = tails.of(tmp_path / "0")
    for number in range(1, 17):
        tails.of(tmp_path / str(number))

    assert tails.of(tmp_path / "16") is not None
    assert tails.of(tmp_path / "0") is not first


def test_a_thousand_runs_are_listed_at_once(finished_run: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    text = (finished_run / "run.json").read_text()
    line = (finished_run / rundir.METRICS).read_text().splitlines()[0] + "\n"
    for number in range(1000):
        run = root / f"run-{number:04}"
        run.mkdir(parents=True)
        (run / "run.json").write_text(text)
        (run / rundir.METRICS).write_text(line * 50)
    index = Index([root])
    index.entries()
    began = time.process_time()
    found = index.entries()
    seconds = time.process_time() - began

    assert len(found) == 1000
    # 0.03 s alone on a core; the bar is for a busy one.
    assert seconds < 0.5, seconds
    assert os.path.dirname(found[0].path) == str(root)
