"""A server of OpenAI's API in processes of its own, and the memory of all of them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mst.launch import offline_environment

_START_SECONDS, _END_SECONDS = 600, 60
# A user's shell has not got it, and it decides how long a step of a single answer takes: with
# threads that sleep between two operators SmolLM2-135M took 26 ms, and 16 as OpenMP has it by
# itself (two cores of an AMD EPYC, Zen 4, torch 2.13.0).
_NOT_PASSED_ON = "OMP_WAIT_POLICY"


@dataclass(frozen=True)
class Server:
    """A server that is ready.

    Attributes:
        pid: of its first process.
        port: on 127.0.0.1.
        model: what callers ask for.
        usage: tokens are counted for callers who ask for it.
    """

    pid: int
    port: int
    model: str
    usage: bool


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Let what is started in here use so many logical CPUs; it says so to mst and torch alike."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def mst_server(
    model_dir: Path, cores: int, place: Path, options: Sequence[str]
) -> Iterator[Server]:
    """Run `mst serve` until left.

    Args:
        model_dir: what it serves.
        cores: how many it uses.
        place: takes its log and its audit log.
        options: further ones.
    """
    command = [
        sys.executable, "-m", "mst", "serve", str(model_dir), "--served-name", "model",
        "--device", "cpu", "--port", "0", "--access-log", "off",
        "--audit-log", str(place / "audit"), *options,
    ]  # fmt: skip
    with _running(command, {}, cores, place / "mst.log") as process:
        said = _await(process, place / "mst.log", lambda text: "\nready " in text)
        found = re.search(r"^serve .* at http://127\.0\.0\.1:(\d+)/", said, re.MULTILINE)
        if found is None:
            raise SystemExit(f"mst serve names no port:\n{said}")
        yield Server(process.pid, int(found[1]), "model", usage=True)


@contextlib.contextmanager
def transformers_server(
    python: str, model_dir: Path, dtype: str, cores: int, place: Path, options: Sequence[str]
) -> Iterator[Server]:
    """Run `transformers serve` until left.

    Args:
        python: interpreter that has transformers and its `serving` extra.
        model_dir: what it serves.
        dtype: torch dtype name of its weights.
        cores: how many it uses.
        place: takes its log.
        options: further ones.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        python, "-m", "transformers.cli.transformers", "serve", str(model_dir), "--device", "cpu",
        "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port), *options,
    ]  # fmt: skip
    environment = offline_environment() | {"OMP_NUM_THREADS": str(cores)}
    log = place / "transformers.log"
    with _running(command, environment, cores, log) as process:
        _await(process, log, lambda text: _healthy(port))
        yield Server(process.pid, port, str(model_dir), usage=False)


@contextlib.contextmanager
def _running(
    command: Sequence[str], environment: Mapping[str, str], cores: int, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    inherited = {name: each for name, each in os.environ.items() if name != _NOT_PASSED_ON}
    with log.open("wb") as output, on_cores(cores):
        process = subprocess.Popen(
            command, env={**inherited, **environment}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _await(process: subprocess.Popen[bytes], log: Path, ready: Callable[[str], bool]) -> str:
    """Return what a server has said when it is ready."""
    until = time.monotonic() + _START_SECONDS
    while True:
        said = log.read_text(encoding="utf-8", errors="replace")
        if ready(said):
            return said
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"{log.stem} does not start:\n{said[-4000:]}")
        time.sleep(0.2)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def peak_rss_bytes(pid: int) -> int:
    """Return the peaks of a server's processes, added up; shared pages count in each."""
    return _added(pid, "VmHWM")


def pss_bytes(pid: int) -> int:
    """Return what a server's processes have in memory; a page that is shared counts once.

    Only root is told of the jail's broker: to another user it counts as nothing.
    """
    return sum(_figure(each, "Pss", "smaps_rollup") for each in processes(pid))


@contextlib.contextmanager
def pss_watched(pid: int, seconds: float = 0.5) -> Iterator[list[int]]:
    """Give a list of what `pss_bytes` says at the beginning, every so many seconds, and at the end.

    The largest is what a server has taken at one time. `peak_rss_bytes` is more: it adds up peaks
    of several moments.
    """
    found, ended = [pss_bytes(pid)], threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            found.append(pss_bytes(pid))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield found
    finally:
        ended.set()
        watching.join()
        found.append(pss_bytes(pid))


def rss_bytes(pid: int) -> int:
    """Return what a server's processes have in memory; shared pages count in each."""
    return _added(pid, "VmRSS")


def _added(pid: int, name: str) -> int:
    return sum(_figure(each, name) for each in processes(pid))


def processes(pid: int) -> list[int]:
    """Return a server's first process, all below it, and all that it has forked.

    The broker of mst's jail is below no other process, but has the command line of the one that has
    forked it, in which a server of this module has a directory of its own.
    """
    found = descendants(pid)
    own = _command_line(pid)
    if own:
        others = (int(each.parent.name) for each in Path("/proc").glob("[0-9]*/cmdline"))
        found += [each for each in others if each not in found and _command_line(each) == own]
    return found


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def descendants(pid: int) -> list[int]:
    """Return a process and all below it (proc_pid_stat(5), field ppid)."""
    parents: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        # One that has ended since is no longer below anything.
        with contextlib.suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def _figure(pid: int, name: str, file: str = "status") -> int:
    """Return bytes of a file of /proc/PID; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(each.split()[1]) * 1024 for each in lines if each.startswith(name + ":"))
