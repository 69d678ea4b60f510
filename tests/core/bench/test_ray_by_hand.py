"""A cluster that was started with `ray start`: found by `--ray auto`, and by its address."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tests.core.bench.ray_start import MATRIX, WANTS_RAY, environment, ray_start, wait_for_ray
from tests.core.bench.test_bench_command import bench

from mst.bench.result_file import read_results
from mst.errors import EXIT_FAILED

pytestmark = [pytest.mark.slow, WANTS_RAY]


@dataclass(frozen=True)
class Started:
    """A head and a node of their own, its address, and the environment in which `auto` finds it."""

    running: list[subprocess.Popen[bytes]]
    address: str
    environ: dict[str, str]


@pytest.fixture
def started() -> Iterator[Started]:
    """A cluster of two nodes that was started by two commands."""
    place = Path(tempfile.mkdtemp(prefix="mr-", dir="/tmp"))
    environ = environment(place)
    running: list[subprocess.Popen[bytes]] = []
    try:
        begin(running, place / "head.log", environ, "--head", "--port=0")
        address = (place / "ray" / "ray_current_cluster").read_text().strip()
        # The node that is no head has a CPU.
        role = (f"--address={address}", '--resources={"mst-cpu": 1}')
        begin(running, place / "node.log", environ, *role)
        yield Started(running, address, environ)
    finally:
        for each in running:
            end(each)
        shutil.rmtree(place, ignore_errors=True)


def begin(
    running: list[subprocess.Popen[bytes]], log: Path, environ: dict[str, str], *role: str
) -> None:
    """Start Ray, and note its process before waiting for it."""
    with log.open("wb") as file:
        running.append(subprocess.Popen(ray_start(*role), stdout=file, stderr=file, env=environ))
    wait_for_ray(running[-1], log)


def end(process: subprocess.Popen[bytes]) -> None:
    """End what `ray start --block` has started, as Ctrl-C does, and what is left of it."""
    if process.poll() is not None:
        return
    left = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs([*left, psutil.Process(process.pid)], timeout=20)
    for each in alive:
        each.kill()
    process.wait()


def test_a_cluster_that_was_started_by_hand_is_found_and_its_end_is_told_of(
    started: Started, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    for name, devices in (("both", "cpu, simchip"), ("one", "simchip")):
        text = MATRIX.format(model=tiny_model, rows=chat_rows, lengths="48", devices=devices)
        (tmp_path / f"{name}.yaml").write_text(text)

    def over(matrix: str, cluster: str, **more: str) -> subprocess.CompletedProcess[str]:
        return bench(
            f"{matrix}.yaml", "--ray", cluster, "--output-dir", f"{matrix}-{cluster[:4]}",
            cwd=tmp_path, environ=started.environ | more,
        )  # fmt: skip

    auto, by_address = over("both", "auto"), over("one", started.address)
    found = {each.cell.device: each for each in read_results(tmp_path / "both-auto").cells}
    absent = read_results(tmp_path / f"one-{started.address[:4]}").cells[0]
    for each in started.running:
        end(each)
    began = time.monotonic()
    # Named, since Ray also looks for other clusters' processes.
    alone = over("one", "auto", RAY_ADDRESS=started.address)
    seconds = time.monotonic() - began

    assert auto.returncode == 0, auto.stdout + auto.stderr
    assert {name: each.status for name, each in found.items()} == {
        "cpu": "done", "simchip": "absent",
    }, auto.stdout  # fmt: skip
    assert (found["cpu"].machine and found["cpu"].machine.device) == "cpu:0"
    assert by_address.returncode == 0, by_address.stdout + by_address.stderr
    assert "the cluster has cpu × 1" in absent.reason
    assert alone.returncode == EXIT_FAILED
    assert f"--ray auto: no Ray head answers at {started.address}" in alone.stderr
    assert seconds < 20
