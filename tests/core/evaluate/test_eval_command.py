"""`mst eval`: the figures of training again, beside the base, and nothing of a row elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mst import rundir
from mst.cli import main


def mst_eval(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mst", "eval", *map(str, arguments), "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_run_is_judged_beside_its_base_as_training_judged_it(
    finished_run: Path, tmp_path: Path
) -> None:
    before = {each: each.stat().st_mtime_ns for each in finished_run.rglob("*")}
    metric = tmp_path / "mine.py"
    metric.write_text("def share(said, meant):\n    return [len(each) / 10 for each in meant]\n")
    done = mst_eval(
        finished_run, "--compare", "base", "--metric", "auto", "exact_match", "--json",
        "--metric-file", f"{metric}:share", "--max-new-tokens", 4,
        "--output", tmp_path / "report.json", "--predictions", tmp_path / "said.jsonl",
        HOME=str(tmp_path),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    figures = {each["name"]: each for each in report["figures"]}
    evaluations = [each for each in rundir.read_metrics(finished_run) if "eval_loss" in each]
    lines = (tmp_path / "said.jsonl").read_text("utf-8").splitlines()

    assert figures["loss"]["value"] == pytest.approx(evaluations[-1]["eval_loss"], rel=1e-3)
    assert figures["loss"]["before"] > figures["loss"]["value"]
    assert figures["loss"]["verdict"] == "better"
    assert {"label_accuracy", "label_accuracy_free", "exact_match", "perplexity"} < set(figures)
    assert figures["share"]["value"] == figures["share"]["before"] > 0.3
    assert (report["rows"], report["left_out"], report["label_tokens"]) == (8, 0, 24)
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == report
    assert set(json.loads(lines[0])) == {
        "file", "row", "reference", "prediction", "compared_prediction",
    }  # fmt: skip
    assert len(lines) == 8
    assert (tmp_path / "said.jsonl").stat().st_mode & 0o777 == 0o600
    assert "my card is" not in done.stdout + done.stderr
    assert {each: each.stat().st_mtime_ns for each in finished_run.rglob("*")} == before


def test_a_model_is_judged_on_files_in_a_table(tiny_model: Path, chat_rows: Path) -> None:
    done = mst_eval(tiny_model, "--dataset", chat_rows, "--metric", "loss", "--limit", 5)
    out = done.stdout

    assert done.returncode == 0, done.stderr
    assert "rows    5, rows.jsonl, 35 left out" in out
    assert "95 % interval" in out
    assert "perplexity" in out
    assert "5 rows are few" in out


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_writes_nothing(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    metric = tmp_path / "slow.py"
    begun = tmp_path / "begun"
    metric.write_text(
        f"import pathlib, time\ndef metric(said, meant):\n"
        f"    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [
            sys.executable, "-m", "mst", "eval", str(tiny_model), "--dataset", str(chat_rows),
            "--metric-file", str(metric), "--metric", "loss", "--limit", "2", "--device", "cpu",
            "--max-new-tokens", "1", "--output", str(tmp_path / "report.json"),
            "--predictions", str(tmp_path / "said.jsonl"),
        ],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(1200):
            if begun.exists() or child.poll() is not None:
                break
            time.sleep(0.1)
        os.killpg(child.pid, signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)

    assert child.returncode == 130, errors
    assert b"Traceback" not in errors
    assert sorted(each.name for each in tmp_path.iterdir()) == ["begun", "slow.py"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "rogue"], "Did you mean rouge"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--metric-file", "none.py"], "none.py: there is no such file"),
        (["--output", "nowhere/report.json"], "its directory is not there"),
        (["--predictions", "nowhere/said.jsonl"], "its directory is not there"),
        ([], "so it has no held-out rows"),
        (["--compare", "base", "--dataset", "rows.jsonl"], "so its base is not known"),
        (["--harness", "wards"], "--tasks-dir None is no directory"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_torch_is_loaded(
    arguments: list[str], words: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny_model), "--device", "cpu", *arguments]) in (1, 2)
    assert words in capsys.readouterr().err
