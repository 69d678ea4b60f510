"""Cells spread over a Ray cluster: placed by what nodes advertise, never two on one device."""

from __future__ import annotations

import importlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from mst import rundir, serial
from mst.bench.cells import Cell
from mst.bench.job import WAITING
from mst.bench.ray_node import PREFIX, describe_node, measure_on_node, measured
from mst.bench.results import ABSENT, FAILED, LOST, Measured, with_notes
from mst.errors import MstError, UsageError
from mst.probe import TORCH_NAMES

if TYPE_CHECKING:
    from mst.bench.job import Wish

# A cell whose node is lost is tried so often again, on whatever node has its resource.
_AGAIN = 1
_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 5.0
_PROBE_SECONDS = 60.0
# Clocks that differ by more are told of; an answer's way takes some of that.
SKEW_SECONDS = 1.0

Measure = Callable[[str, str, str, tuple[str, ...], Mapping[str, Any]], str]
Describe = Callable[[], dict[str, Any]]


class ClusterError(MstError):
    """The Ray cluster can't be reached, or isn't one that cells can be given to."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        id: Ray's.
        name: of the machine.
        offset_seconds: by how much its clock is ahead of ours.
        mst: its version.
    """

    id: str
    name: str
    offset_seconds: float
    mst: str


def on_cluster(
    wish: Wish,
    to_do: Sequence[Cell],
    stage: Callable[[Cell, str], None],
    notes: list[str],
    measure: Measure = measure_on_node,
    describe: Describe = describe_node,
) -> Iterator[Measured]:
    """Yield what came of each cell, in the order in which they end.

    A cell whose device no node has is absent; one whose node dies is tried once more elsewhere,
    and else lost.

    Args:
        wish: has the address, and what is passed on to the nodes.
        to_do: cells to measure.
        stage: is told of each cell that is handed over.
        notes: takes what a reader of all cells should know.
        measure: what runs on a node.
        describe: what a node says of itself, its time among it.

    Raises:
        UsageError: Ray isn't installed, or a cell names no kind of device.
        ClusterError: there is no cluster.
    """
    kinds = {each.id: kind_of(each) for each in to_do}
    ray = connect(wish.ray)
    try:
        nodes = _nodes(ray, notes, describe)
        yield from _spread(ray, wish, to_do, kinds, nodes, stage, measure)
    finally:
        ray.shutdown()


def kind_of(cell: Cell) -> str:
    """Return the backend whose devices a cell is for.

    Raises:
        UsageError: it names a certain device, or none; Ray chooses that.
    """
    if cell.device == "auto" or ":" in cell.device:
        raise UsageError(
            f"with --ray a device is named by its kind (cpu, cuda, ascend …), and the node and the"
            f" number are chosen; found {cell.device!r}. Name kinds under devices."
        )
    return TORCH_NAMES.get(cell.device, cell.device)


def connect(address: str) -> Any:
    """Return Ray, connected to the cluster.

    Args:
        address: "auto" for the one that was started on this machine, or HOST:PORT.

    Raises:
        UsageError: Ray isn't installed.
        ClusterError: nobody answers.
    """
    # Read when Ray is imported; without it Ray would send statistics of its use to its makers.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise UsageError(
            "--ray needs Ray, which is not installed here. Install it, on every node too: python -m"
            ' pip install "mst-train[bench]"'
        ) from None
    try:
        found = _started_here() if address == "auto" else address
        _check_reachable(found, address)
        ray.init(address=found, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        told = [*str(error).strip().splitlines(), type(error).__name__][0].rstrip(".")
        raise ClusterError(
            f"--ray {address}: no Ray cluster answers ({told}). Start one: docs/bench.md has the"
            " two commands."
        ) from None
    return ray


def _started_here() -> str:
    """Return the address of the cluster that was started on this machine, as Ray finds it.

    It may have ended since: Ray itself would try for minutes to reach that.

    Raises:
        ConnectionError: none was.
    """
    services: Any = importlib.import_module("ray._private.services")
    found = str(services.get_ray_address_from_environment("auto", None))
    if found == "auto":
        raise ConnectionError("none was started here")
    return found


def _check_reachable(address: str, asked: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UsageError(f"--ray takes auto or HOST:PORT, not {address!r}.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, UnicodeError) as error:  # the latter of a name that can be none
        why = getattr(error, "strerror", None) or error
        raise ClusterError(
            f"--ray {asked}: no Ray head answers at {address} ({why}). `ray status"
            f" --address {address}` on that machine says whether it runs."
        ) from None


def clock_offset(asked: float, told: float, answered: float) -> float:
    """Return by how much another clock is ahead, to half of the answer's time.

    Source: RFC 5905, section 8, of one exchange.
    """
    return told - (asked + answered) / 2


def _nodes(ray: Any, notes: list[str], describe: Describe) -> dict[str, Node]:
    """Return the nodes that live, and note clocks and versions that differ."""
    import mst

    affinity = importlib.import_module("ray.util.scheduling_strategies")
    # num_cpus=0: a node whose cores are all asked for answers too.
    remote = ray.remote(num_cpus=0, max_retries=0)(describe)
    found: dict[str, Node] = {}
    for each in ray.nodes():
        if not each["Alive"]:
            continue
        chosen = affinity.NodeAffinitySchedulingStrategy(each["NodeID"], soft=False)
        # The first answer waits for a process to start; the second tells the time.
        pinned = remote.options(scheduling_strategy=chosen)
        try:
            ray.get(pinned.remote(), timeout=_PROBE_SECONDS)
            asked = time.time()
            told = ray.get(pinned.remote(), timeout=_PROBE_SECONDS)
        except ray.exceptions.RayError as error:
            notes.append(f"node {each['NodeManagerHostname']} gave no answer ({_kind(error)})")
            continue
        offset = clock_offset(asked, told["clock"], time.time())
        node = Node(each["NodeID"], told["name"], round(offset, 3), told["mst"])
        found[node.id] = node
        notes += node_notes(node, mst.__version__)
    return found


def on_our_clock(each: Measured) -> Measured:
    """Return a cell whose beginning and end are told by this machine's clock, not its node's."""
    offset = each.machine.clock_offset_seconds if each.machine else None
    if not offset:
        return each
    return replace(each, began=_earlier(each.began, offset), ended=_earlier(each.ended, offset))


def _earlier(moment: str, seconds: float) -> str:
    told = datetime.fromisoformat(moment) - timedelta(seconds=seconds)
    return told.isoformat(timespec="seconds")


def node_notes(node: Node, version: str) -> list[str]:
    """Return what a reader of a node's cells should know: its clock, and another mst."""
    found = []
    if abs(node.offset_seconds) > SKEW_SECONDS:
        words = "ahead" if node.offset_seconds > 0 else "behind"
        found.append(
            f"the clock of {node.name} is {abs(node.offset_seconds):.1f} s {words}: when its cells"
            " began and ended is told by this machine's clock; what took how long, by its own"
            " monotonic one"
        )
    if node.mst != version:
        found.append(f"{node.name} has mst {node.mst}, this machine {version}")
    return found


def _spread(
    ray: Any,
    wish: Wish,
    to_do: Sequence[Cell],
    kinds: Mapping[str, str],
    nodes: Mapping[str, Node],
    stage: Callable[[Cell, str], None],
    measure: Measure,
) -> Iterator[Measured]:
    waiting: dict[Any, tuple[Cell, int]] = {}
    remote = ray.remote(num_cpus=0, max_retries=0)(_on_node)
    offsets = {node.id: node.offset_seconds for node in nodes.values()}

    def hand_over(cell: Cell, tries: int) -> None:
        name, count = needed(cell, kinds[cell.id])
        task = remote.options(resources={name: count}, runtime_env={"env_vars": _VARIABLES})
        keep = {"offsets": offsets, "peers": dict(wish.peers)}
        sent = (serial.dumps(cell), kinds[cell.id], wish.seal, keep, measure)
        waiting[task.remote(*sent)] = (cell, tries)
        stage(cell, WAITING)

    for cell in to_do:
        if _has(ray, cell, kinds[cell.id]):
            hand_over(cell, 0)
        else:
            yield _absent(cell, kinds[cell.id], ray.cluster_resources())
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_LOOK_SECONDS)
        for task in ready:
            cell, tries = waiting.pop(task)
            found = _result(ray, task, cell)
            if found.status != LOST or not _may_again(ray, cell, kinds[cell.id], tries):
                if tries:
                    found = with_notes(found, "measured again: the first node was lost")
                yield found
                continue
            hand_over(cell, tries + 1)
        if not ready:
            yield from _stranded(ray, waiting, kinds)


# Ray hides the cards of tasks that ask for none by its own name of them; mst chooses by itself.
_VARIABLES = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def _on_node(
    cell: str, backend: str, seal: tuple[str, ...], keep: Mapping[str, Any], measure: Measure
) -> str:
    """Measure on the node that Ray has chosen."""
    node = importlib.import_module("ray").get_runtime_context().get_node_id()
    told = {"offset": keep["offsets"].get(node), "peers": keep["peers"]}
    return measure(cell, backend, node, seal, told)


def needed(cell: Cell, kind: str) -> tuple[str, float]:
    """Return the resource that a cell takes, and how much of it."""
    return f"{PREFIX}{kind}", 1.0 if kind == "cpu" else float(cell.devices)


def _has(ray: Any, cell: Cell, kind: str) -> bool:
    return has(ray.nodes(), *needed(cell, kind))


def has(nodes: Iterable[Mapping[str, Any]], name: str, count: float) -> bool:
    """Return whether one of the nodes that live has so much of a resource.

    A cell takes all its devices from one node: of two with one each, Ray would wait for ever.
    """
    return any(each["Alive"] and each["Resources"].get(name, 0.0) >= count for each in nodes)


def _absent(cell: Cell, kind: str, there: Mapping[str, float]) -> Measured:
    count = needed(cell, kind)[1]
    has = ", ".join(
        f"{one.removeprefix(PREFIX)} × {there[one]:g}"
        for one in sorted(there)
        if one.startswith(PREFIX)
    )
    return Measured(
        cell.id, cell, ABSENT,
        reason=f"{count:g} of {kind} on one node are needed, and the cluster has"
        f" {has or 'no device of mst'}. A node advertises its devices by"
        ' `ray start --resources="$(mst bench resources)"`.',
        ended=rundir.now(),
    )  # fmt: skip


def _result(ray: Any, task: Any, cell: Cell) -> Measured:
    """Return what a task came to; a node that died makes the cell lost."""
    ended = Measured(cell.id, cell, LOST, ended=rundir.now())
    try:
        return on_our_clock(measured(ray.get(task)))
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", error)
        why = str(cause) if isinstance(cause, MstError) else type(cause).__name__
        return replace(ended, status=FAILED, reason=f"on the node: {why}")
    except ray.exceptions.RayError as error:
        return replace(ended, reason=f"its node was lost ({_kind(error)})")
    except ValueError:
        return replace(
            ended, status=FAILED, reason="the node sent what this mst can't read: another version?"
        )


def _may_again(ray: Any, cell: Cell, kind: str, tries: int) -> bool:
    if tries >= _AGAIN:
        return False
    # A node that has just died may be counted still.
    time.sleep(_LOOK_SECONDS)
    return _has(ray, cell, kind)


def _stranded(
    ray: Any, waiting: dict[Any, tuple[Cell, int]], kinds: Mapping[str, str]
) -> Iterator[Measured]:
    """Yield cells whose device no node has any longer, as lost."""
    nodes = ray.nodes()
    for task, (cell, _) in list(waiting.items()):
        if not has(nodes, *needed(cell, kinds[cell.id])):
            ray.cancel(task, force=True)
            del waiting[task]
            yield Measured(
                cell.id, cell, LOST, ended=rundir.now(),
                reason=f"no node with {kinds[cell.id]} is left in the cluster",
            )  # fmt: skip


def _kind(error: BaseException) -> str:
    return type(error).__name__
