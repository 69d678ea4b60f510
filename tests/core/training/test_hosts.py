"""Two machines that share a job: two network namespaces with their own addresses, and a cable."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.two_hosts import cabled, ip

from mst.errors import EXIT_FAILED
from mst.rundir import CHECKPOINTS, read_manifest, read_metrics
from mst.training import checkpoint

ADDRESSES = ("10.231.77.1", "10.231.77.2")
OPTIONS = {
    "device": "cpu", "dtype": "float32", "tuner": "lora", "val-size": 0, "label-accuracy": "off",
    "learning-rate": 0.01, "optim": "adamw_torch", "gradient-accumulation-steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces joined by a veth; the second has a card that leads nowhere, too."""
    with cabled("mst-", "mst0", ADDRESSES) as names:
        ip("-n", names[1], "link", "add", "nowhere0", "type", "veth", "peer", "end0")
        ip("-n", names[1], "link", "set", "end0", "up")
        ip("-n", names[1], "addr", "add", "192.0.2.9/32", "dev", "nowhere0")
        ip("-n", names[1], "link", "set", "nowhere0", "up")
        yield names


def start(
    host: str, log: Path, options: dict[str, object], **environ: str
) -> subprocess.Popen[bytes]:
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "mst", "train", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environ}
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


@contextlib.contextmanager
def both(
    hosts: tuple[str, str], directory: Path, options: dict[str, object], **second: str
) -> Iterator[tuple[subprocess.Popen[bytes], ...]]:
    """Start the command on each host; the variables are the second's."""
    shared = {"nnodes": 2, "nproc-per-node": 1, "master-addr": ADDRESSES[0], "master-port": 29631,
              "allow-net": "10.231.77.0/24"}  # fmt: skip
    jobs = [
        start(
            host,
            directory / f"log{rank}",
            {**OPTIONS, **options, **shared, "node-rank": rank},
            **(second if rank else {}),
        )
        for rank, host in enumerate(hosts)
    ]
    try:
        yield tuple(jobs)
    finally:
        for each in jobs:
            each.kill()


def said(directory: Path) -> str:
    return (directory / "log0").read_text() + (directory / "log1").read_text()


def losses(run: Path) -> list[float]:
    return [float(each["loss"]) for each in read_metrics(run)]


@pytest.fixture(scope="module")
def alone(
    hosts: tuple[str, str],
    tiny_model: Path,
    chat_rows: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[float]:
    """The losses of one process on the first host."""
    place = tmp_path_factory.mktemp("alone")
    options = {
        **OPTIONS, "model": tiny_model, "dataset": chat_rows, "max-steps": 3,
        "output-dir": place / "one", "per-device-train-batch-size": 8,
    }  # fmt: skip

    assert start(hosts[0], place / "log", options).wait(120) == 0, (place / "log").read_text()
    return losses(place / "one")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["off", "zero3"])
def test_two_hosts_have_the_losses_of_one_process(
    strategy: str,
    hosts: tuple[str, str],
    alone: list[float],
    tiny_model: Path,
    chat_rows: Path,
    tmp_path: Path,
) -> None:
    options: dict[str, object] = {"model": tiny_model, "dataset": chat_rows, "max-steps": 3}
    shared = options | {"output-dir": tmp_path / "two", "per-device-train-batch-size": 4}
    if strategy != "off":
        pytest.importorskip("deepspeed", reason="wants DeepSpeed")
    with both(hosts, tmp_path, shared | {"deepspeed": strategy}) as jobs:
        codes = [each.wait(120) for each in jobs]

    assert codes == [0, 0], said(tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=1e-5)
    assert len(losses(tmp_path / "two")) == 3
    assert "training along with machine 0, 10.231.77.1, over mst0" in said(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_a_killed_worker_ends_the_job_on_both_hosts(
    host: int, hosts: tuple[str, str], tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options: dict[str, object] = {
        "model": tiny_model, "dataset": chat_rows, "output-dir": run, "max-steps": 100_000,
        "per-device-train-batch-size": 2, "save-steps": 5,
    }  # fmt: skip
    with both(hosts, tmp_path, options) as jobs:
        deadline = time.monotonic() + 120
        while not checkpoint.newest_whole(run / CHECKPOINTS):
            assert [each.poll() for each in jobs] == [None, None], said(tmp_path)
            assert time.monotonic() < deadline, said(tmp_path)
            time.sleep(0.2)
        os.kill(worker_of(jobs[host].pid), signal.SIGKILL)
        killed = time.monotonic()
        codes = [each.wait(70) for each in jobs]
        seconds = time.monotonic() - killed

    assert seconds < 60
    assert 0 not in codes
    assert read_manifest(run).status == "failed"
    assert "--resume" in said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    assert checkpoint.newest_whole(run / CHECKPOINTS) is not None


def worker_of(job: int) -> int:
    """Return the process of the one worker under a command."""
    parents = {}
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            words = (each / "cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = (each / "stat").read_text().rpartition(")")[2].split()[1]
            if "mst.training.worker" in words:
                parents[int(each.name)] = int(parent)
    return next(pid for pid, parent in parents.items() if parent == job)


@pytest.mark.slow
def test_a_rank_that_cannot_be_reached_is_named_before_training(
    hosts: tuple[str, str], tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    options: dict[str, object] = {
        "model": tiny_model, "dataset": chat_rows, "output-dir": tmp_path / "run", "max-steps": 2,
        "per-device-train-batch-size": 2,
    }  # fmt: skip
    with both(hosts, tmp_path, options, GLOO_SOCKET_IFNAME="nowhere0") as jobs:
        codes = [each.wait(110) for each in jobs]

    assert codes == [EXIT_FAILED, EXIT_FAILED], said(tmp_path)
    assert "can't reach rank 1 on" in said(tmp_path)
    assert "(nowhere0, 192.0.2.9)" in said(tmp_path)
    assert "Traceback" not in said(tmp_path)
