"""Ranks that torchrun or srun have started: each is an `mst train` with a worker of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mst.errors import EXIT_FAILED
from mst.plan import Plan
from mst.rundir import PLAN, read_document, read_manifest, read_metrics

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
MODULE = ["-m", "mst", "train"]


def flags(model: Path, rows: Path, run: Path, **changes: object) -> list[str]:
    values = {
        "model": model, "dataset": rows, "output-dir": run, "device": "cpu", "dtype": "float32",
        "max-steps": 3, "val-size": 0, "label-accuracy": "off", "tuner": "lora",
        "gradient-accumulation-steps": 1, "per-device-train-batch-size": 4,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }  # fmt: skip
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def losses(run: Path) -> list[float]:
    return [float(one["loss"]) for one in read_metrics(run)]


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def alone(
    tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of one process on the same global batch."""
    run = tmp_path_factory.mktemp("alone") / "run"
    more = flags(tiny_model, chat_rows, run, per_device_train_batch_size=8)
    subprocess.run(
        [sys.executable, *MODULE, *more],
        env={**os.environ, **ENVIRONMENT}, check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    return losses(run)


@pytest.mark.slow
def test_torchrun_starts_the_ranks(
    alone: list[float], tiny_model: Path, chat_rows: Path, tmp_path: Path, port: int
) -> None:
    run = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [sys.executable, *launcher, *MODULE, *flags(tiny_model, chat_rows, run)],
        env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert read_document(Plan, run, PLAN).world_size == 2
    assert losses(run) == pytest.approx(alone, rel=1e-5)


def as_srun_does(port: int, tasks: list[list[str]]) -> tuple[list[int], str]:
    """Start one process a task with a step's variables; return the codes and all output."""
    jobs = []
    for rank, arguments in enumerate(tasks):
        step = {
            "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NNODES": "1",
            "SLURM_NTASKS": str(len(tasks)), "SLURM_STEP_NODELIST": "localhost",
        }  # fmt: skip
        jobs.append(
            subprocess.Popen(
                [sys.executable, *MODULE, *arguments, "--master-port", str(port)],
                env={**os.environ, **ENVIRONMENT, **step},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    said = "".join(each.communicate(timeout=200)[0] for each in jobs)
    return [each.returncode for each in jobs], said


@pytest.mark.slow
def test_sruns_variables_place_the_ranks(
    alone: list[float], tiny_model: Path, chat_rows: Path, tmp_path: Path, port: int
) -> None:
    run = tmp_path / "run"
    codes, said = as_srun_does(port, [flags(tiny_model, chat_rows, run)] * 2)

    assert codes == [0, 0], said
    assert losses(run) == pytest.approx(alone, rel=1e-5)
    assert read_manifest(run).status == "done"


def test_a_plan_that_rank_0_cannot_make_ends_all_ranks(
    tiny_model: Path, tmp_path: Path, port: int
) -> None:
    none = flags(tiny_model, tmp_path / "no-such.jsonl", tmp_path / "run")
    codes, said = as_srun_does(port, [none] * 2)

    assert codes == [EXIT_FAILED, EXIT_FAILED]
    assert "no-such.jsonl" in said
    assert "Traceback" not in said
