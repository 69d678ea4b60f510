"""Before several machines begin: does every rank reach every other one?"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from mst.errors import RunError

# A machine that answers at all answers within this; starting up is not counted.
REACH_SECONDS = 30.0
# Loading torch from a cold disk, on the slowest machine.
ARRIVE_SECONDS = 600.0


def preflight(
    store: Any,
    rank: int,
    world_size: int,
    interface: str,
    address: str,
    arrive_seconds: float = ARRIVE_SECONDS,
) -> None:
    """Connect to every other rank, then sum one number over all.

    Args:
        store: torch's, that all ranks reach.
        rank: of this process.
        world_size: ranks in all.
        interface: that this rank's collectives use.
        address: of this machine on it.
        arrive_seconds: how long a rank may take to come here.

    Raises:
        RunError: some rank can't be reached, or did not come; names it, its host and interface.
    """
    import torch

    distributed: Any = torch.distributed
    store = distributed.PrefixStore("preflight", store)
    with _listening(address) as port:
        place = {"host": socket.gethostname(), "interface": interface, "at": [address, port]}
        store.set(f"rank/{rank}", json.dumps(place))
        places = _arrived(store, world_size, arrive_seconds)
        faults = [
            f"rank {rank} on {place['host']} ({interface}, {address}) can't reach"
            f" {_named(other, each)}: {fault}"
            for other, each in places.items()
            if (fault := _fault(each["at"]))
        ]
        store.set(f"faults/{rank}", json.dumps(faults))
        told = _answers(store, "faults", world_size, 2 * REACH_SECONDS + 5)
        silent = [_named(each, places[each]) for each in range(world_size) if each not in told]
        every = [fault for each in told.values() for fault in each]
    if silent:
        every.append(f"no answer from {', '.join(silent)}")
    if every:
        raise RunError(
            f"the machines don't all reach each other, found before training: {'; '.join(every)}."
            " Open the ports between them in the firewall, or name the right network card in"
            " GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME or HCCL_SOCKET_IFNAME)."
        )
    _sum(store, rank, world_size, places)


def _sum(store: Any, rank: int, world_size: int, places: dict[int, Any]) -> None:
    """Sum one number over all ranks, in the library that carries the agreements."""
    import torch

    try:
        torch.distributed.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=REACH_SECONDS),
        )
        one = torch.ones(1)
        torch.distributed.all_reduce(one)
        torch.distributed.destroy_process_group()
    except RuntimeError as error:
        raise RunError(
            f"{_named(rank, places[rank])} reaches all other ranks, but a first sum over them"
            f" failed: {str(error).splitlines()[0][:200]}."
        ) from None
    if int(one) != world_size:
        raise RunError(f"{world_size} ranks were to sum to {world_size}, and came to {int(one)}.")


def _named(rank: int, place: dict[str, Any]) -> str:
    return f"rank {rank} on {place['host']} ({place['interface']}, {place['at'][0]})"


@contextlib.contextmanager
def _listening(address: str) -> Iterator[int]:
    """Yield a port of `address` at which connections are taken by the kernel."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind((address, 0))
        server.listen(1024)
        yield int(server.getsockname()[1])


def _fault(at: list[Any]) -> str:
    """Return why a connection can't be made, or ""."""
    try:
        with socket.create_connection((str(at[0]), int(at[1])), timeout=REACH_SECONDS):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _answers(store: Any, name: str, world_size: int, seconds: float) -> dict[int, Any]:
    """Return what the ranks have set under `name` by now, or when all have."""
    found: dict[int, Any] = {}
    until = time.monotonic() + seconds
    while len(found) < world_size and time.monotonic() < until:
        for rank in set(range(world_size)) - set(found):
            if store.check([f"{name}/{rank}"]):
                found[rank] = json.loads(store.get(f"{name}/{rank}"))
        time.sleep(0.02)
    return found


def _arrived(store: Any, world_size: int, seconds: float) -> dict[int, Any]:
    found = _answers(store, "rank", world_size, seconds)
    missing = [str(each) for each in range(world_size) if each not in found]
    if missing:
        here = ", ".join(_named(rank, each) for rank, each in sorted(found.items()))
        raise RunError(
            f"rank {', '.join(missing)} did not come within {seconds:.0f} s; here are {here}. Look"
            " at the output on the other machine."
        )
    return found
