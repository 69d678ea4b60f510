"""An export reads the run's rows again just as they were trained on, or says why it can't."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.simulated import installed

from mst.cli import main


def mst(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mst", *map(str, arguments)],
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_rows_that_have_changed_since_the_training_are_refused(
    finished_run: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    shutil.copytree(finished_run, run)
    for name in ("run.json", "request.json"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace(str(chat_rows), str(rows)))
    rows.write_text(chat_rows.read_text().replace("too high", "too late"))
    done = mst("export", run)

    assert done.returncode == 1
    assert "rows.jsonl, or an image that it names, is not what" in done.stderr
    assert "Put the file back" in done.stderr
    assert "too late" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (run / "export/merged").exists()


@pytest.mark.slow
def test_a_run_with_a_packages_objective_is_exported_where_the_package_is(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    pairs = [
        {"prompt": f"card {number}", "chosen": f"yes, card {number}", "rejected": "no"}
        for number in range(16)
    ]
    rows.write_text("".join(json.dumps(each) + "\n" for each in pairs))
    path = os.pathsep.join([str(installed("robust_dpo")), os.environ.get("PYTHONPATH", "")])
    trained = mst(
        "train", "--model", tiny_model, "--dataset", rows, "--output-dir", run, "--task",
        "robust-dpo", "--device", "cpu", "--threads", 1, "--max-steps", 1, "--val-size", 4,
        "--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 1, PYTHONPATH=path,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr

    without = main(["export", str(run)])
    said = capsys.readouterr().err
    done = mst("export", run, PYTHONPATH=path)

    assert without == 2
    assert "--task robust-dpo was asked for" in said
    assert "install the plugin that has it" in said
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "export/merged/manifest.json").read_text())["status"] == "passed"
