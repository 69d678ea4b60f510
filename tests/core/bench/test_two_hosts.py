"""A cluster of two hosts with addresses and names of their own, the second killed in the middle."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tests.core.bench.ray_start import MATRIX, WANTS_RAY, environment, ray_start, wait_for_ray
from tests.core.bench.test_ray import training_on
from tests.two_hosts import cabled, ip

from mst.bench.result_file import read_results

# Of this process's own, for two sessions of tests may share a machine.
_NET = f"10.{64 + os.getpid() % 128}.{os.getpid() // 128 % 256}"
ADDRESSES = (f"{_NET}.129", f"{_NET}.130")

pytestmark = [
    pytest.mark.slow,
    WANTS_RAY,
    pytest.mark.skipif(
        os.getloadavg()[0] > 2 * (os.cpu_count() or 1),
        reason="wants a quieter machine: Ray ends a node whose agents take more than 15 s to start",
    ),
]


@dataclass(frozen=True)
class Hosts:
    """Two hosts on which Ray runs, and the environment in which its cluster is found."""

    names: tuple[str, str]
    environ: dict[str, str]


def on(host: str, name: str, *command: str) -> list[str]:
    """Return a command line that runs on a host, which has a name of its own."""
    script = f'hostname {name} && exec "$@"'
    return ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", script, "sh", *command]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """A head on the first host and a node on the second, each with one CPU."""
    place = Path(tempfile.mkdtemp(prefix="mr-", dir="/tmp"))
    environ = environment(place)
    roles = (["--head", "--port=6379"], [f"--address={ADDRESSES[0]}:6379"])
    with cabled("mst-r", "mst1", ADDRESSES) as names:
        for name, other in zip(names, reversed(ADDRESSES), strict=True):
            # Ray asks the kernel from which address it would call a host outside, and calls none.
            ip("-n", name, "route", "add", "default", "via", other)
        running = []
        try:
            for number, role in enumerate(roles):
                log = place / f"ward-{number + 1}.log"
                running.append(begin_ray(names[number], number, role, environ, log))
                wait_for_ray(running[-1], log)
            yield Hosts(names, environ)
        finally:
            for name in names:
                end(name)
            for each in running:
                each.wait()
            shutil.rmtree(place, ignore_errors=True)


def begin_ray(
    host: str, number: int, role: list[str], environ: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start Ray on a host."""
    name = f"ward-{number + 1}"
    own = (f"--node-ip-address={ADDRESSES[number]}", '--resources={"mst-cpu": 1}')
    with log.open("wb") as file:
        return subprocess.Popen(
            on(host, name, *ray_start(*role, *own)), stdout=file, stderr=file,
            env={**environ, "MST_TEST_NODE": name},
        )  # fmt: skip


def end(host: str) -> None:
    """Kill all that runs on a host, as if its power was gone."""
    told = subprocess.run(
        ["ip", "netns", "pids", host], capture_output=True, text=True, check=False
    )
    for each in told.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(each), signal.SIGKILL)


def test_a_host_that_is_lost_in_the_middle_has_its_cell_measured_on_the_other(
    hosts: Hosts, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    text = MATRIX.format(model=tiny_model, rows=chat_rows, lengths="48, 64", devices="cpu")
    (tmp_path / "matrix.yaml").write_text(text)
    command = [
        sys.executable, "-m", "mst", "bench", "matrix.yaml", "--output-dir", "out", "--ray", "auto",
    ]  # fmt: skip
    bench = subprocess.Popen(
        on(hosts.names[0], "ward-1", *command), env=hosts.environ, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until = time.monotonic() + 200
    while not (running := training_on("ward-2")) and bench.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.1)
    end(hosts.names[1])
    said, _ = bench.communicate(timeout=300)
    found = read_results(tmp_path / "out").cells

    assert bench.returncode == 0, said
    assert [each.status for each in found] == ["done", "done"], said
    assert {each.machine.node for each in found if each.machine} == {"ward-1"}, said
    lost = [each for each in found if "measured again: the first node was lost" in each.notes]
    assert len(lost) == 1, said
    # Its run has died with it.
    assert running
    assert psutil.wait_procs(running, timeout=20)[1] == []
