"""`mst train --streaming`, from a file to a result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from mst.rundir import read_manifest, read_metrics


def test_a_streamed_run_trains_and_tells_which_rows_taught_nothing(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    turns = [{"role": "user", "content": "a card " * 300}, {"role": "assistant", "content": "no"}]
    rows.write_text(chat_rows.read_text() + json.dumps({"messages": turns}) + "\n")
    options = {
        "model": tiny_model, "dataset": rows, "output-dir": run, "device": "cpu",
        "num-train-epochs": 2, "per-device-train-batch-size": 6, "max-length": 96,
        "gradient-accumulation-steps": 1, "learning-rate": 0.01, "threads": 1, "val-size": 0.1,
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "mst", "train", "--streaming", *flags],
        env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    losses = [each["loss"] for each in read_metrics(run) if "loss" in each]

    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of the rows that were read taught nothing: longer than --max-length" in done.stdout
    assert "37 to train on, 4 held out" in done.stdout
    assert "1 of 37 rows are longer than 96 tokens" in done.stdout
    assert losses[-1] < losses[0]
    assert read_manifest(run).status == "done"
    assert read_manifest(run).data[0].rows == 41

    judged = subprocess.run(
        [sys.executable, "-m", "mst", "eval", str(run), "--metric", "loss", "--json"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert judged.returncode == 0, judged.stderr
    evaluations = [each["eval_loss"] for each in read_metrics(run) if "eval_loss" in each]
    told = json.loads(judged.stdout)

    assert told["rows"] == 4
    assert abs(told["figures"][0]["value"] - evaluations[-1]) < 0.02
