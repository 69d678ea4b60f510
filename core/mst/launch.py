"""Start a worker process with the environment that the plan asks for, and wait for it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mst.errors import EXIT_PEER_FAILED, JailError

# After one rank has failed, the time that the others have to notice and to end by themselves: a
# save of a whole model may be under way.
PEER_SECONDS = 40.0
# How often another machine's end is looked for.
WATCH_SECONDS = 1.0
# What `run_worker` returns of a worker that SIGKILL has ended, and what is said of it.
KILLED = 128 + signal.SIGKILL
WAS_KILLED = "the worker was killed (SIGKILL); the kernel does that when memory runs out"
SOCKET_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
# How often libgomp's threads look, awake, for what they wait for, before they sleep: 300,000 times
# unless told. Beside other work they keep that from the core which the awaited thread needs. With
# 1,000 compiled steps took 15 % longer on two idle cores, with 10,000 no longer (docs/speed.md).
_SPINS = "10000"


def offline_environment() -> dict[str, str]:
    """Return variables that keep libraries from calling a host or loading vendor code unasked."""
    return {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        # Only a backend's mst_activate loads vendor code: a torch-npu without its driver, left
        # behind in the environment, would break `import torch` for a job on the CPU.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        # transformers forks nothing here; the tokenizers' own pool would fight OpenMP for cores.
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Ranks of one machine meet on loopback only.
        **dict.fromkeys(SOCKET_INTERFACES, "lo"),
    }


def worker_environment(
    environ: Mapping[str, str], plan: Mapping[str, str], interface: str = "lo"
) -> dict[str, str]:
    """Return the worker's whole environment: the user's, made offline, then the plan's.

    Args:
        environ: the user's.
        plan: the plan's.
        interface: network interface of the collectives. Where it leads to other machines, the
            user's own variables win.
    """
    sockets = {}
    if interface != "lo":
        sockets = {name: environ.get(name, interface) for name in SOCKET_INTERFACES}
    return {**_patience(environ), **environ, **offline_environment(), **sockets, **plan}


def _patience(environ: Mapping[str, str]) -> dict[str, str]:
    """Return how threads wait for each other where the user has not said it."""
    if environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        return {}
    return {"GOMP_SPINCOUNT": _SPINS}


def run_worker(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    keep_open: Sequence[int] = (),
) -> int:
    """Run `python -m module arguments` in the foreground and return its exit code.

    Args:
        module: of mst.
        arguments: its command line.
        environment: all of it.
        keep_open: file descriptors that the worker inherits, such as a lock's.

    Ctrl-C reaches the worker through the terminal's process group; this process only waits, so
    that the worker can save. SIGTERM is handed on. A death by signal N returns 128 + N.
    """
    return run_ranks(module, [arguments], environment, keep_open)


def how_it_ended(code: int, if_killed: str = "") -> str:
    """Return how a worker has failed, as the end of a sentence without its full stop.

    Args:
        code: that `run_worker` has returned; neither 0 nor of Ctrl-C.
        if_killed: what to do where it was killed, which leaves no reason of its own; a sentence
            without its full stop.
    """
    if code != KILLED:
        return f"the worker ended with code {code}, its reason stands above"
    return f"{WAS_KILLED}. {if_killed}" if if_killed else WAS_KILLED


def run_ranks(
    module: str,
    ranks: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    keep_open: Sequence[int] = (),
    failed: Callable[[], str] | None = None,
    seal_file: Path | None = None,
) -> int:
    """Run one worker a rank, as `run_worker` does, and return the exit code of the first to fail.

    When one ends in failure the others get some seconds to notice, then are stopped. All run in
    the jail that this process is in, or else in one of their own.

    Args:
        module: of mst.
        ranks: the command line of each.
        environment: of all.
        keep_open: file descriptors that they inherit.
        failed: says how workers on another machine have ended, "" while they have not.
        seal_file: where a jail of their own is written down.

    Raises:
        JailError: there are several, and this jail holds one process.
    """
    from mst.seal.jail.holder import sealed_ranks
    from mst.seal.jail.seal import SECCOMP, current

    seal = current()
    if seal is not None and seal.layer == SECCOMP and len(ranks) > 1:
        raise JailError(
            f"{len(ranks)} processes were planned, and they meet over sockets, which the jail that"
            " this machine gives does not have. Pass --nproc-per-node 1, or see what"
            " `mst doctor --seal` advises."
        )
    holder = sealed_ranks(module, ranks, keep_open, seal_file)
    commands = [[sys.executable, "-m", module, *each] for each in ranks]
    workers: list[subprocess.Popen[bytes]] = []

    def stop_all(*_: object) -> None:
        for each in workers:
            each.terminate()

    # Handled before the first worker is there, so that a signal between two starts is not lost.
    # Not SIG_IGN: a worker would inherit that, and could not be interrupted.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, stop_all),
    }
    interruptible()
    try:
        for command in [holder] if holder else commands:
            with _held_back():
                worker = subprocess.Popen(
                    command,
                    env=dict(environment),
                    cwd=os.getcwd(),
                    pass_fds=tuple(keep_open),
                    # The interactive worker is the only one.
                    stdin=None if len(ranks) == 1 else subprocess.DEVNULL,
                )
            workers.append(worker)
        alone = len(workers) == 1 and failed is None
        code = workers[0].wait() if alone else _first_failure(workers, failed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Start processes that Ctrl-C waits for: one that still imports would die with a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def interruptible() -> None:
    """Take the Ctrl-C that `run_ranks` has held back from this process, now that it is handled."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _first_failure(
    workers: Sequence[subprocess.Popen[bytes]], failed: Callable[[], str] | None
) -> int:
    """Wait for all and return 0, or the code of the first that failed by itself."""
    codes: list[int] = []
    running = list(workers)
    deadline = None
    look = time.monotonic()
    while running:
        for each in [one for one in running if one.poll() is not None]:
            running.remove(each)
            codes.append(each.returncode)
        elsewhere = ""
        if failed is not None and deadline is None and time.monotonic() > look:
            elsewhere = failed()
            look = time.monotonic() + WATCH_SECONDS
        if (any(codes) or elsewhere) and deadline is None:
            deadline = time.monotonic() + PEER_SECONDS
            if elsewhere:
                codes.append(EXIT_PEER_FAILED)
        if deadline is not None and time.monotonic() > deadline:
            for each in running:
                # A rank in a collective that never ends does not come to handle SIGTERM.
                each.kill()
            deadline = None
        time.sleep(0.05)
    own = [code for code in codes if code not in (0, EXIT_PEER_FAILED)]
    return next(iter(own), max(codes))
