"""Ray started by its own command, `ray start`, and the small matrix that its clusters measure."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

MATRIX = """
name: started
models: [{model}]
dataset: {rows}
lengths: [{lengths}]
batches: [2]
devices: [{devices}]
steps: 1
warm_up: 0
repeats: 1
val_rows: 0
options: {{threads: 1, dtype: float32}}
"""
WANTS_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="wants Ray, of the extra bench"
)


def environment(place: Path) -> dict[str, str]:
    """Return an environment in which Ray keeps its files in a directory and calls nobody.

    A socket's path may have 107 characters, and Ray's own part of it is long: the directory's path
    must be short.
    """
    return {
        **os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(place), "COLUMNS": "200",
        "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RAY_raylet_start_wait_time_s": "150",
    }  # fmt: skip


def ray_start(*role: str) -> list[str]:
    """Return the command line of a head or a node with one CPU for Ray's own tasks."""
    own = ["--include-dashboard=false"] if "--head" in role else []
    return [
        sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", *role, *own,
        "--num-cpus=1", f"--object-store-memory={80 * 2**20}", "--block",
        "--include-log-monitor=false",
    ]  # fmt: skip


def wait_for_ray(running: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until Ray says that it runs."""
    until = time.monotonic() + 150
    while "Ray runtime started" not in log.read_text():
        assert running.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)
