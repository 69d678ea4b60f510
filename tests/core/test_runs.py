"""`mst runs`: reads what is there, and takes no harm from what should not be."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mst import rundir
from mst.cli import main
from mst.curve import draw, write_png
from mst.errors import MstError, RunError
from mst.runs import curves, differing_options, find_run, list_runs, newest_done, summary


@pytest.fixture
def runs(finished_run: Path, tmp_path: Path) -> Path:
    """Two finished runs that differ in a seed, a killed one, and what is none."""
    root = tmp_path / "runs"
    for index, name in enumerate(("first", "second", "killed", "torn", "odd")):
        shutil.copytree(finished_run, root / name)
        created = f"2026-0{index + 1}-01T00:00:00+00:00"
        rundir.update_manifest(root / name, created=created)
    request = json.loads((root / "second" / "request.json").read_text())
    (root / "second" / "request.json").write_text(json.dumps(request | {"seed": 7}))
    rundir.update_manifest(root / "killed", status="running", results={})
    (root / "torn" / "run.json").write_text('{"status": "do')
    (root / "odd" / "metrics.jsonl").write_bytes(b'3\n{"step": "x", "loss": 1}\n\xff\xfe')
    (root / "photos").mkdir()
    (root / ".hidden").mkdir()
    (root / "notes.txt").write_text("hello")
    return root


def test_every_directory_is_listed_for_what_it_is(runs: Path) -> None:
    found = {each.name: each for each in list_runs(runs)}
    first, killed = found["first"], found["killed"]

    assert {name: each.state for name, each in found.items()} == {
        "photos": "not a run", "torn": "damaged", "first": "done", "second": "done",
        "killed": "killed", "odd": "done",
    }  # fmt: skip
    assert [each.name for each in list_runs(runs)][-4:] == ["first", "second", "killed", "odd"]
    assert (first.model, first.steps) == ("tiny-llama", 4)
    assert first.eval_loss == curves(runs / "first")[1][-1][1]
    assert (
        first.tokens_per_second == rundir.read_manifest(runs / "first").results["tokens_per_second"]
    )
    assert (killed.steps, killed.tokens_per_second) == (4, None)
    assert found["odd"].loss is None


def test_the_newest_finished_run_is_found(runs: Path, tmp_path: Path) -> None:
    shutil.rmtree(runs / "odd")

    assert newest_done(runs) == runs / "second"
    assert newest_done(tmp_path / "nowhere") is None


def test_a_run_is_found_by_path_or_name(runs: Path) -> None:
    assert find_run("first", runs) == runs / "first"
    assert find_run(str(runs / "first")) == runs / "first"
    with pytest.raises(RunError, match="photos is no run"):
        find_run("photos", runs)


def test_a_summary_of_a_crashed_runs_metrics_keeps_the_whole_lines(runs: Path) -> None:
    metrics = runs / "killed" / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    found = summary(runs / "killed")

    assert (found.steps, found.loss) == (1, 2.5)


def test_who_looks_whether_a_run_goes_on_keeps_nobody_from_resuming_it(tmp_path: Path) -> None:
    (tmp_path / rundir.LOCK).touch()
    looking = (tmp_path / rundir.LOCK).open("r")
    fcntl.flock(looking, fcntl.LOCK_SH)  # as is_locked does
    threading.Timer(0.1, looking.close).start()

    with rundir.take_lock(tmp_path):
        assert rundir.is_locked(tmp_path)
        with pytest.raises(RunError, match=f"process {os.getpid()}"):
            rundir.take_lock(tmp_path)


def test_options_that_differ_are_named(runs: Path) -> None:
    assert differing_options([runs / "first", runs / "second"]) == {"seed": (42, 7)}
    assert differing_options([runs / "first", runs / "first"]) == {}


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["runs", *map(str, arguments)])
    out, err = capsys.readouterr()

    assert (code, err) == (0, "")
    return out


def test_list_prints_one_line_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "list", runs).splitlines()

    assert [line.split()[0] for line in lines[1:7]] == [
        "photos", "torn", "first", "second", "killed", "odd",
    ]  # fmt: skip
    assert "torn" in lines[7]
    assert "damaged" in lines[7]
    plain = json.loads(shown(capsys, "list", runs, "--json"))
    assert [each["name"] for each in plain][2:4] == ["first", "second"]


def test_show_prints_the_result_and_draws_the_curve(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = shown(capsys, "show", runs / "first", "--png", tmp_path / "loss.png")
    plain = json.loads(shown(capsys, "show", runs / "first", "--json"))

    for text in (
        "tiny-llama",
        "best_eval_loss",
        "lora on cpu",
        "• loss",
        "◆ held-out loss",
        "wrote",
    ):
        assert text in out
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [step for step, _ in plain["loss"]] == [1, 2, 3, 4]
    assert plain["state"] == "done"
    chinese = shown(capsys, "show", runs / "first", "--lang", "zh")
    for text in ("(已完成)", "模型    tiny-llama", "lora，设备 cpu", "◆ 留出数据的损失"):
        assert text in chinese


def test_compare_shows_differences_and_both_curves(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = (runs / "first", runs / "second")
    out = shown(capsys, "compare", *pair)
    plain = json.loads(shown(capsys, "compare", *pair, "--json"))

    assert ["seed", "42", "7"] in [line.split() for line in out.splitlines()]
    assert "a loss" in out
    assert "b held-out loss" in out
    assert plain["options"] == {"seed": [42, 7]}
    assert len(plain["curves"]) == 2


def test_names_are_looked_up_under_runs(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs.parent)

    assert "first" in shown(capsys)
    assert "tiny-llama" in shown(capsys, "show", "first")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "first"), "takes 2 to 9 runs; found 1"),
        (("show", "photos"), "photos is no run"),
        (("show", "torn"), "is damaged"),
        (("list", "nowhere"), "nowhere is no directory"),
        (("delete", "first"), "invalid choice"),
        (("list", "--jsn"), "unknown option --jsn"),
    ],
)
def test_mistakes_are_explained(
    runs: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs.parent)

    assert main(["runs", *arguments]) != 0
    assert message in capsys.readouterr().err


def test_a_curve_falls_from_the_upper_left_to_the_lower_right() -> None:
    lines = draw({"loss": [(1, 4.0), (2, 2.0), (3, 0.0)]}, width=5, height=3).splitlines()

    assert lines == [
        "        4 │•",
        "          │  •",
        "        0 │    •",
        "          └─────",
        "     step  1   3",
        "           • loss",
    ]


@pytest.mark.parametrize("points", [[], [(1, float("nan"))], [(1, float("inf"))]])
def test_a_curve_without_a_number_is_not_drawn(points: list[tuple[int, float]]) -> None:
    assert draw({"loss": points}) == ""


def test_a_flat_curve_and_a_single_point_are_drawn() -> None:
    assert "•" in draw({"loss": [(7, 1.0)]})
    assert draw({"loss": [(1, 1.0), (9, 1.0)]}, width=9).splitlines()[0].endswith("│•       •")


def test_a_png_without_matplotlib_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MstError, match=r"pip install 'mst-train\[plot\]'"):
        write_png({"loss": [(1, 1.0)]}, tmp_path / "x.png")


def test_a_png_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(MstError, match="cannot write --png"):
        write_png({"loss": [(1, 1.0)]}, tmp_path / "no" / "x.png")


def test_listing_runs_loads_no_torch(runs: Path) -> None:
    code = (
        "import sys; from mst.cli import main; main(['runs', 'list', sys.argv[1]]);"
        "print({'torch', 'transformers', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )

    assert done.stderr == "set()\n"
