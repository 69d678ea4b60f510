"""A machine outside the jail, services beside it, and children that try to reach both."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

HERE = Path(__file__).parent
# Of this process's own, for two sessions of tests may share a machine.
_NET = f"10.{64 + os.getpid() % 128}.{os.getpid() // 128 % 256}"
_NET6 = f"fd00:{os.getpid() % 0x10000:x}"
ADDRESSES = (f"{_NET}.1", f"{_NET}.2", f"{_NET6}::1", f"{_NET6}::2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def serving(*before: str, **facts: Any) -> Iterator[int]:
    """Run `sink.py` and yield its port."""
    command = [*before, sys.executable, str(HERE / "sink.py"), json.dumps(facts)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        yield int(running.stdout.readline())
        running.kill()


@contextlib.contextmanager
def machine_with_a_cable() -> Iterator[dict[str, Any]]:
    """A network namespace that this one reaches over a veth, with the sink in it."""
    name, near, far = (
        f"mst-s{os.getpid()}",
        f"mj{os.getpid() % 10**6}a",
        f"mj{os.getpid() % 10**6}b",
    )
    ip("netns", "add", name)
    try:
        ip("link", "add", near, "type", "veth", "peer", "name", far)
        ip("link", "set", far, "netns", name)
        for where, card, four, six in (
            ([], near, ADDRESSES[0], ADDRESSES[2]),
            (["-n", name], far, ADDRESSES[1], ADDRESSES[3]),
        ):
            ip(*where, "addr", "add", f"{four}/24", "dev", card)
            ip(*where, "-6", "addr", "add", f"{six}/64", "dev", card, "nodad")
            ip(*where, "link", "set", card, "up")
        ip("-n", name, "link", "set", "lo", "up")
        inside = ("ip", "netns", "exec", name)
        there = list(ADDRESSES[1::2])
        with serving(*inside, addresses=there, port=9099, names=True) as port:
            yield {"sink": there[0], "sink6": there[1], "port": port, "dns": 53,
                   "own": ADDRESSES[0], "third": f"{_NET}.9"}  # fmt: skip
    finally:
        ip("netns", "del", name)


@contextlib.contextmanager
def this_machines_card() -> Iterator[dict[str, Any]]:
    """Without root: the sink at an address of this machine that isn't loopback."""
    found = [
        each.address
        for name, addresses in psutil.net_if_addrs().items()
        for each in addresses
        if each.family == socket.AF_INET and name != "lo"
    ]
    if not found:
        pytest.skip("wants root and iproute2, or a network card with an address")
    with serving(addresses=found[:1]) as port:
        yield {"sink": found[0], "sink6": "", "port": port, "dns": port, "own": found[0]}


@pytest.fixture(scope="session")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What `ways.FACTS` holds: the sink, and services on this machine."""
    with contextlib.ExitStack() as stack:
        try:
            facts = stack.enter_context(machine_with_a_cable())
        except (OSError, subprocess.CalledProcessError):
            facts = stack.enter_context(this_machines_card())
        # A short name: a unix socket's path has 108 bytes.
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="mst-ways-"))
        facts |= services(directory, stack)
        held = socket.create_connection((facts["sink"], facts["port"]), 3)
        stack.callback(held.close)
        facts |= {"pid": os.getpid(), "their": held.fileno(), "torch": False}
        yield facts


def services(directory: str, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Start services on loopback and unix sockets."""
    names = {
        "path": f"{directory}/docker.sock", "log": f"{directory}/log",
        "name": f"mst-way-{os.getpid()}",
    }  # fmt: skip
    local = stack.enter_context(serving(addresses=["127.0.0.1"], **names))
    return {
        **names, "local": local, "proxy": f"http://127.0.0.1:{local}",
        "come": f"{directory}/come-", "directory": directory,
    }  # fmt: skip


@contextlib.contextmanager
def visitor(facts: dict[str, Any]) -> Iterator[None]:
    """Connect from outside to every port that a file names."""
    stop = threading.Event()

    def visit() -> None:
        while not stop.wait(0.05):
            for each in Path(facts["directory"]).glob("come-*"):
                with contextlib.suppress(OSError):
                    place = (facts["own"], int(each.name.removeprefix("come-")))
                    socket.create_connection(place, 1).close()

    thread = threading.Thread(target=visit)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for each in Path(facts["directory"]).glob("come-*"):
            each.unlink()


@pytest.fixture
def take_ways(outside: dict[str, Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that takes every way out in a layer, or "outside" of any."""

    def take(layer: str, **more: Any) -> dict[str, Any]:
        held = socket.create_connection((outside["sink"], outside["port"]), 3)
        facts = {**outside, "inherited": held.fileno(), **more}
        command = [sys.executable, str(HERE / "ways.py"), layer, json.dumps(facts)]
        if facts["dns"] == 53:
            names = tmp_path / "resolv.conf"
            names.write_text(f"nameserver {facts['sink']}\noptions timeout:1 attempts:1\n")
            mount = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
            command = ["unshare", "-m", "sh", "-c", mount, str(names), *command]
        with held, visitor(outside):
            answer = subprocess.run(
                command, capture_output=True, text=True, pass_fds=(held.fileno(),), timeout=150
            )

        assert answer.returncode == 0, answer.stderr
        found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
        return found

    return take


def run_python(code: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python and return how it ended."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **more,
    )


def wait_for(found: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)
