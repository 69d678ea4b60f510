"""What runs on a node of a Ray cluster: it says what it has, and measures what it is sent."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from mst import serial
from mst.bench.cells import Cell
from mst.bench.peak import remembered_peaks
from mst.bench.results import Measured
from mst.bench.run_cell import Place, run_cell
from mst.errors import MstError
from mst.facts import MachineFacts

# Before a backend's name, in what nodes advertise.
PREFIX = "mst-"
_WAIT_SECONDS = 0.5


def resources(facts: MachineFacts) -> dict[str, float]:
    """Return what a node advertises: how many devices of each backend can be used, and their kinds.

    `accelerator_type:…` is Ray's own way to name a chip. One CPU stands for all cores of the
    machine, so that no two cells share them.
    """
    found: dict[str, float] = {}
    for report in facts.backends:
        if not report.probe.usable:
            continue
        found[f"{PREFIX}{report.name}"] = float(len(report.probe.devices))
        if report.name != "cpu":
            for device in report.probe.devices:
                chip = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-")
                found[f"accelerator_type:{chip}"] = 1.0
    return found


def describe_node() -> dict[str, Any]:
    """Return a node's name, mst, and clock."""
    import mst

    return {"name": platform.node(), "mst": mst.__version__, "clock": time.time()}


def measure_on_node(
    cell_text: str, backend: str, node: str, seal: tuple[str, ...], keep: Mapping[str, Any]
) -> str:
    """Measure a cell on a free device of this node, and return what came of it as JSON.

    Ray starts no more of these at once than there are devices; which one is free is told by locks,
    so that another bench on the same node is respected too.

    Args:
        cell_text: the cell as JSON.
        backend: of its device.
        node: Ray's id of this node.
        seal: options of the jail and the audit log.
        keep: "offset" of this node's clock, and "peers": the interpreter of each.
    """
    from mst.probe import machine_facts
    from mst.registry import load

    cell = serial.loads(Cell, cell_text)
    environ = dict(os.environ)
    if environ.get("CUDA_VISIBLE_DEVICES") == "":
        # Ray hides the cards of tasks that ask for none by its own name of them.
        del environ["CUDA_VISIBLE_DEVICES"]
        os.environ.pop("CUDA_VISIBLE_DEVICES")
    registry = load()
    facts = machine_facts(registry)
    total = next((len(each.probe.devices) for each in facts.backends if each.name == backend), 0)
    directory = Path(tempfile.mkdtemp(prefix="mst-bench-"))
    place = Place(
        directory, facts, registry, environ, seal, remembered_peaks(directory, environ, seal),
        peers=keep["peers"],
    )  # fmt: skip
    try:
        with free_device(backend, total, cell.devices, node) as index:
            device = backend if backend == "cpu" else f"{backend}:{index}"
            found = run_cell(replace(cell, device=device), place)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    machine = found.machine
    if machine is not None:
        machine = replace(machine, clock_offset_seconds=keep["offset"])
    return serial.dumps(replace(found, id=cell.id, cell=cell, machine=machine))


@contextlib.contextmanager
def free_device(backend: str, total: int, count: int, node: str) -> Iterator[int]:
    """Yield the first of `count` devices in a row that nobody else measures on, and hold them.

    Args:
        backend: of the devices.
        total: how many there are.
        count: how many are needed; one CPU is all that a machine has, however many ranks share it.
        node: whose they are; nodes that are simulated on one machine have their own.
    """
    place = Path(tempfile.gettempdir()) / f"mst-bench-locks-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    if place.lstat().st_uid != os.getuid():
        raise MstError(f"{place} is another user's, so devices can't be held. Remove it.")
    needed = 1 if backend == "cpu" else count
    while True:
        for first in range(max(1, total - needed + 1)):
            held = _held(place, [f"{node}-{backend}-{first + each}" for each in range(needed)])
            if held is not None:
                try:
                    yield first
                finally:
                    for each in held:
                        each.close()
                return
        time.sleep(_WAIT_SECONDS)


def _held(place: Path, names: list[str]) -> list[IO[str]] | None:
    held: list[IO[str]] = []
    for name in names:
        file = (place / name).open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            for each in held:
                each.close()
            return None
        held.append(file)
    return held


def measured(text: str) -> Measured:
    """Return what a node sent.

    Raises:
        ValueError: it is of another version of mst.
    """
    return serial.from_json(Measured, json.loads(text))
