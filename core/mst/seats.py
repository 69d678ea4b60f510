"""Several `mst train` that work on one job: seat 0 plans, the others take its plan over a store.

The store is torch's TCPStore, which speaks to any number of clients and needs no shared disk. Seat
0 hands over the documents of the run directory; each seat starts its own workers and tells how
they ended. A seat that falls silent ends the job on all others.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import mst
from mst.errors import EXIT_FAILED, EXIT_PEER_FAILED, RunError
from mst.interfaces import chosen
from mst.placement import Placement

# People type the command on one machine after the other.
JOIN_SECONDS = 600.0
BEAT_SECONDS = 3.0
# A seat that has said nothing for so long is lost: it, its machine or the network.
SILENT_SECONDS = 30.0
_LIBRARIES = ("torch", "transformers", "peft", "safetensors")


@dataclass
class Seats:
    """This process's seat, and the store in which it meets the others.

    Attributes:
        place: which seat this is.
        store: torch's, under a prefix of this job's attempt.
        interface: network interface that leads to the others.
        address: of this machine on it.
        round: attempts that were handed over; a retry is one more.
    """

    place: Placement
    store: Any
    interface: str
    address: str
    round: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def meeting(self) -> str:
        """What a worker is told of where the ranks of this round meet: JSON."""
        where = {
            "address": self.place.address,
            "port": self.place.port,
            "prefix": f"{_prefix(self.place)}/workers/{self.round}",
            "interface": self.interface,
            "own": self.address,
        }
        return json.dumps(where)

    def ranks(self, devices: int) -> range:
        """Return the ranks of this seat's workers, when each machine has so many devices."""
        if self.place.devices == 1 and self.place.first_rank >= 0:
            return range(self.place.first_rank, self.place.first_rank + 1)
        return range(self.place.seat * devices, (self.place.seat + 1) * devices)


def _prefix(place: Placement) -> str:
    return f"mst-{place.attempt}"


@contextlib.contextmanager
def meet(
    place: Placement, environ: Mapping[str, str], seconds: float = JOIN_SECONDS
) -> Iterator[Seats]:
    """Take this process's seat and yield it once all are taken.

    Args:
        place: from `mst.placement.placement`.
        environ: GLOO_SOCKET_IFNAME in it overrides the interface that the kernel would take.
        seconds: how long to wait for the others.

    Raises:
        RunError: a seat stays empty, is taken twice, or its program is another one; says which.
    """
    # Only a worker's mst_activate loads vendor code.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # A peer that ends is told in words; torch would print its own stack beside them.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    interface, address = "lo", "127.0.0.1"
    if place.nnodes > 1:
        interface, address = chosen(place.address, place.port, environ.get("GLOO_SOCKET_IFNAME"))
    seats = Seats(place, _store(place, seconds), interface, address)
    try:
        _roll_call(seats, seconds)
    except RunError:
        if place.seat == 0:
            time.sleep(BEAT_SECONDS)  # the others look for the reason where this process listens
        raise
    except RuntimeError:
        raise RunError(
            f"machine 0 at {place.address}:{place.port} has ended while the others came. Its output"
            " says why."
        ) from None
    beat = threading.Thread(target=_beat, args=(seats,), daemon=True)
    beat.start()
    try:
        yield seats
    finally:
        seats.stopped.set()
        beat.join(BEAT_SECONDS)


def _store(place: Placement, seconds: float) -> Any:
    import torch

    distributed: Any = torch.distributed
    listening = None
    host = place.seat == 0 and not place.hosted
    if host:
        # torch would listen on every network of the machine; this is the one that was named.
        listening = _listen(place)
    try:
        store = distributed.TCPStore(
            place.address,
            place.port,
            is_master=host,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listening,
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"seat {place.seat} could not reach machine 0 at {place.address}:{place.port} within"
            f" {seconds:.0f} s ({type(error).__name__}). Is `mst train` running there, with the"
            " same --master-addr and --master-port, and is the port open?"
        ) from None
    return distributed.PrefixStore(_prefix(place), store)


def _listen(place: Placement) -> int:
    """Return a file descriptor that listens at the named address; the store closes it."""
    try:
        family, kind, protocol, _, at = socket.getaddrinfo(
            place.address, place.port, type=socket.SOCK_STREAM
        )[0]
        server = socket.socket(family, kind, protocol)
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(at)
            server.listen(1024)
        except OSError:
            server.close()
            raise
    except OSError as error:
        raise RunError(
            f"cannot listen at {place.address}:{place.port}: {error.strerror or error}."
            " --master-addr must be an address of machine 0 (--node-rank 0), and the port free:"
            " pass another --master-port on every machine."
        ) from None
    return server.detach()


def _roll_call(seats: Seats, seconds: float) -> None:
    """Tell who is here, and look at who the others are."""
    place, store = seats.place, seats.store
    mine = {
        "host": socket.gethostname(),
        "seats": place.seats,
        "nnodes": place.nnodes,
        "versions": versions(),
    }
    if int(store.add(f"taken/{place.seat}", 1)) > 1:
        raise RunError(
            f"seat {place.seat} of the job at {place.address}:{place.port} is taken already. Give"
            " each machine its own --node-rank, from 0 on."
        )
    store.set(f"seat/{place.seat}", json.dumps(mine))
    until = time.monotonic() + seconds
    others: dict[int, Any] = {}
    while len(others) < place.seats:
        for each in set(range(place.seats)) - set(others):
            if store.check([f"seat/{each}"]):
                others[each] = json.loads(store.get(f"seat/{each}"))
        fault = _differences(mine, others)
        for each in range(place.seats):
            if int(store.add(f"taken/{each}", 0)) > 1:
                fault = (
                    f"seat {each} was taken twice: two commands have --node-rank {each}. Give each"
                    " machine its own."
                )
        if fault:
            store.set("refused", fault)
            raise RunError(fault)
        if store.check(["refused"]):
            raise RunError(store.get("refused").decode())
        if time.monotonic() > until:
            missing = ", ".join(str(each) for each in range(place.seats) if each not in others)
            came = ", ".join(f"{each} ({one['host']})" for each, one in sorted(others.items()))
            raise RunError(
                f"seat {missing} of {place.seats} did not come within {seconds:.0f} s; here are"
                f" {came}. Type the command there with --node-rank {missing}, or look why it ended."
            )
        time.sleep(0.05)


def versions() -> dict[str, str]:
    """Return the versions that have to be alike on every machine."""
    from importlib.metadata import version

    found = {name: version(name) for name in _LIBRARIES}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"mst": mst.__version__, "python": python, **found}


def _differences(mine: Mapping[str, Any], others: Mapping[int, Mapping[str, Any]]) -> str:
    """Return how another seat's program or number of seats differs from this one's, or ""."""
    for seat, other in sorted(others.items()):
        for name in ("nnodes", "seats"):
            if other[name] != mine[name]:
                return (
                    f"{other['host']} (seat {seat}) was started for {other[name]} {name} and"
                    f" {mine['host']} for {mine[name]}. Pass the same --nnodes everywhere."
                )
        for name, version in mine["versions"].items():
            if other["versions"].get(name) != version:
                return (
                    f"{mine['host']} has {name} {version} and {other['host']} (seat {seat}) has"
                    f" {other['versions'].get(name)}. Install the same on every machine."
                )
    return ""


def _beat(seats: Seats) -> None:
    count = 0
    while not seats.stopped.wait(BEAT_SECONDS if count else 0):
        count += 1
        with contextlib.suppress(RuntimeError):
            seats.store.set(f"beat/{seats.place.seat}", str(count))


def watcher(seats: Seats) -> Callable[[], str]:
    """Return a function that says which other seat has failed or fallen silent; "" for none."""
    others = [each for each in range(seats.place.seats) if each != seats.place.seat]
    beats = {each: ("", time.monotonic()) for each in others}

    def failed() -> str:
        for each in others:
            try:
                ended = f"end/{seats.round}/{each}"
                if seats.store.check([ended]):
                    said = json.loads(seats.store.get(ended))
                    if said["code"]:
                        return f"seat {each} on {said['host']} ended with code {said['code']}"
                    continue
                key = f"beat/{each}"
                beat = seats.store.get(key).decode() if seats.store.check([key]) else ""
            except RuntimeError:
                return f"the store at {seats.place.address}:{seats.place.port} is gone"
            before, since = beats[each]
            if beat != before:
                beats[each] = (beat, time.monotonic())
            elif time.monotonic() - since > SILENT_SECONDS:
                return f"seat {each} has said nothing for {SILENT_SECONDS:.0f} s"
        return ""

    return failed


def hand_over(seats: Seats, documents: Mapping[str, str], checks: Mapping[str, Any]) -> None:
    """Give the other seats a round's documents, and wait until all have found them right.

    Args:
        seats: this is seat 0.
        documents: text of each file of the run directory that a worker reads.
        checks: what has to be the same on every machine, as `fingerprints` returns it.

    Raises:
        RunError: on some machine the model or the data differ; names it.
    """
    seats.round += 1
    number, store = seats.round, seats.store
    store.set(f"job/{number}", json.dumps({"documents": documents, "checks": checks}))
    until = time.monotonic() + JOIN_SECONDS
    faults = []
    failed = watcher(seats)
    for each in range(1, seats.place.seats):
        while not store.check([f"ready/{number}/{each}"]):
            lost = failed()
            if lost or time.monotonic() > until:
                raise RunError(f"the plan was not taken: {lost or f'seat {each} is silent'}.")
            time.sleep(0.1)
        fault = store.get(f"ready/{number}/{each}").decode()
        if fault:
            faults.append(fault)
    store.set(f"go/{number}", json.dumps(faults))
    if faults:
        raise RunError("; ".join(faults))


def dismiss(seats: Seats, code: int) -> None:
    """Tell the other seats that there are no more rounds, and wait a moment for them to hear it."""
    with contextlib.suppress(RuntimeError):
        seats.store.set(f"job/{seats.round + 1}", json.dumps({"code": code}))
        until = time.monotonic() + 2 * BEAT_SECONDS
        for each in range(1, seats.place.seats):
            while not seats.store.check([f"heard/{each}"]) and time.monotonic() < until:
                time.sleep(0.05)


def tell_end(seats: Seats, code: int) -> None:
    """Say how this seat's workers ended."""
    said = {"code": code, "host": socket.gethostname()}
    with contextlib.suppress(RuntimeError):
        seats.store.set(f"end/{seats.round}/{seats.place.seat}", json.dumps(said))


def first_cause(seats: Seats, code: int) -> int:
    """Return the code of the seat that failed by itself, where this one's only heard of it."""
    until = time.monotonic() + 2 * BEAT_SECONDS
    while code == EXIT_PEER_FAILED and time.monotonic() < until:
        for each in range(seats.place.seats):
            with contextlib.suppress(RuntimeError):
                key = f"end/{seats.round}/{each}"
                if seats.store.check([key]):
                    other = int(json.loads(seats.store.get(key))["code"])
                    if other not in (0, EXIT_PEER_FAILED):
                        return other
        time.sleep(0.2)
    return code


def serve(
    seats: Seats,
    check: Callable[[Mapping[str, Any]], str],
    run_round: Callable[[Path], int],
) -> int:
    """Work off the rounds that seat 0 hands over; return the job's exit code.

    Args:
        seats: this is not seat 0.
        check: says what differs on this machine, or "".
        run_round: trains what lies in a directory, and returns the workers' exit code.

    Raises:
        RunError: seat 0 is lost, or refused to begin.
    """
    failed = watcher(seats)
    code = EXIT_FAILED
    while True:
        number = seats.round + 1
        task = json.loads(_awaited(seats, f"job/{number}", failed))
        if "code" in task:
            with contextlib.suppress(RuntimeError):
                seats.store.set(f"heard/{seats.place.seat}", "1")
            return int(task["code"])
        seats.round = number
        fault = check(task["checks"])
        seats.store.set(f"ready/{number}/{seats.place.seat}", fault)
        faults = json.loads(_awaited(seats, f"go/{number}", failed))
        if faults:
            raise RunError("; ".join(faults))
        with tempfile.TemporaryDirectory(prefix="mst-") as directory:
            for name, text in task["documents"].items():
                (Path(directory) / name).write_text(text, encoding="utf-8")
            code = run_round(Path(directory))
        tell_end(seats, code)


def _awaited(seats: Seats, key: str, failed: Callable[[], str]) -> str:
    """Return what seat 0 sets under `key`; no patience is too long, as long as it lives."""
    silent_since = time.monotonic()
    while True:
        try:
            if seats.store.check([key]):
                return str(seats.store.get(key).decode())
            lost = failed()
        except RuntimeError:
            lost = "machine 0 is gone"
        # Another seat's failure is seat 0's to handle: it may begin another round.
        if lost and ("gone" in lost or lost.startswith("seat 0 has said")):
            raise RunError(f"{lost}. The run directory lies there; go on with --resume.")
        if time.monotonic() - silent_since > 1:
            time.sleep(0.2)
        time.sleep(0.02)
