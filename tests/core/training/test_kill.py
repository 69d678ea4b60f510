"""SIGKILL at random moments, inside saves too, ends byte-identical to the uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mst import rundir
from mst.training import checkpoint

KILLS = 24
INSIDE_A_SAVE = 6

# Run in a process of its own that has imported torch but used none of its threads, so that it can
# fork a worker in milliseconds; a fresh interpreter would spend the test's time on imports.
KILLER = """
import json, os, pathlib, random, signal, sys, time
import peft, torch, transformers  # noqa: F401
from mst.training import worker
from mst.training.checkpoint import listed

run, kills, inside = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(7)
done = in_save = 0

def saving():
    return any((run / "checkpoints").glob(".step-*.part"))

for attempt in range(200):
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        code = worker.main([str(run), "0", "alone"])
        os._exit(code)
    want_save = in_save < inside
    delay = draw.uniform(0.05, 0.4)
    began = None
    newest = listed(run / "checkpoints")[-1:]
    while done < kills and os.waitpid(pid, os.WNOHANG) == (0, 0):
        # The clock starts with the loop, which the first new line of metrics shows.
        if began is None and listed(run / "checkpoints")[-1:] != newest:
            began = time.monotonic()
        if began is None:
            time.sleep(0.001)
            continue
        late = time.monotonic() - began > delay
        if late and (not want_save or saving()):
            inside_now = saving()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done += 1
            in_save += inside_now
            break
    else:
        if done >= kills:
            _, status = os.waitpid(pid, 0)
        print(json.dumps({"kills": done, "in_save": in_save, "attempts": attempt + 1}))
        break
"""


@pytest.mark.slow
def test_killed_runs_end_byte_identical(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    mst = [sys.executable, "-m", "mst", "train"]
    options = [
        "--model", str(tiny_model), "--dataset", str(chat_rows), "--label-accuracy", "off",
        "--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "1",
        "--max-steps", "1000", "--save-steps", "3", "--eval-steps", "50", "--val-size", "4",
        "--lora-dropout", "0.1", "--dtype", "float32", "--threads", "1",
    ]  # fmt: skip
    subprocess.run([*mst, *options, "--output-dir", str(whole)], check=True, capture_output=True)

    killed = tmp_path / "killed"
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("checkpoints", "adapter"))
    rundir.update_manifest(killed, status="running", finished=None, results={}, outputs={})
    (killed / rundir.METRICS).unlink()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = subprocess.run(
        [sys.executable, "-c", KILLER, str(killed), str(KILLS), str(INSIDE_A_SAVE)],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    counts = json.loads(found.stdout.splitlines()[-1])

    assert counts["kills"] >= KILLS
    assert counts["in_save"] >= INSIDE_A_SAVE
    assert rundir.state_of(killed) == "done"
    for name in ("adapter_model.safetensors", checkpoint.OPTIMIZER, checkpoint.RANDOM):
        one, other = (
            checkpoint.checkpoint_path(run / "checkpoints", 1000) / name for run in (whole, killed)
        )
        assert one.read_bytes() == other.read_bytes(), name
    losses = [
        [
            (each["step"], each.get("loss"), each.get("eval_loss"))
            for each in rundir.read_metrics(run)
        ]
        for run in (whole, killed)
    ]
    assert losses[0] == losses[1]
