"""Cells on a Ray cluster of simulated machines: placed by device, in parallel, a node killed."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.measured_cells import A100, cell, measured
from tests.simulated import simchip_environment
from tests.simulated_ascend import ascend_environment

from mst.bench.cells import cells_of
from mst.bench.job import Wish
from mst.bench.matrix import METHODS, Matrix, Method
from mst.bench.procedure import Procedure
from mst.bench.ray_cluster import (
    ClusterError,
    Node,
    clock_offset,
    connect,
    has,
    kind_of,
    needed,
    node_notes,
    on_cluster,
    on_our_clock,
)
from mst.bench.ray_node import describe_node, free_device, resources
from mst.bench.results import Measured
from mst.errors import UsageError
from mst.facts import BackendReport, DeviceFacts, MachineFacts, Probe

GIB = 2**30
WITH_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="wants Ray, of the extra bench"
)
CHIP = DeviceFacts("simchip", 0, "SimChip v1", "sim1", GIB, GIB, ("bfloat16",))
PROCESSOR = DeviceFacts("cpu", 0, "a CPU", "x86_64", GIB, GIB, ("bfloat16",))
MACHINE = MachineFacts(
    "Linux",
    "3.11",
    (
        BackendReport("cpu", Probe(True, True, (PROCESSOR,))),
        BackendReport("simchip", Probe(True, True, (CHIP, replace(CHIP, index=1)))),
        BackendReport("cuda", Probe(True, False, (replace(CHIP, backend="cuda"),), "no driver")),
    ),
)


def test_a_node_advertises_what_its_backends_can_use() -> None:
    assert resources(MACHINE) == {
        "mst-cpu": 1.0, "mst-simchip": 2.0, "accelerator_type:SimChip-v1": 1.0,
    }  # fmt: skip


def test_a_cell_takes_its_devices_and_a_cpu_is_one_however_many_ranks_share_it() -> None:
    two = {"options": {"nproc_per_node": "2"}}

    assert needed(cell(device="cuda", **two), "cuda") == ("mst-cuda", 2.0)
    assert needed(cell(device="cpu", **two), "cpu") == ("mst-cpu", 1.0)
    assert kind_of(cell(device="npu")) == "ascend"


def test_a_cell_takes_all_its_devices_from_one_node_that_lives() -> None:
    def node(count: float, alive: bool = True) -> dict[str, Any]:
        return {"Alive": alive, "Resources": {"CPU": 8.0, "mst-cuda": count}}

    assert has([node(1), node(2)], "mst-cuda", 2)
    assert not has([node(1), node(1)], "mst-cuda", 2)
    assert not has([node(1), node(2, alive=False)], "mst-cuda", 2)
    assert not has([node(1)], "mst-ascend", 1)


@pytest.mark.parametrize("device", ["auto", "cuda:1"])
def test_a_device_that_ray_is_to_choose_is_named_by_its_kind(device: str) -> None:
    with pytest.raises(UsageError, match="named by its kind"):
        kind_of(cell(device=device))


def told_too_late() -> dict[str, Any]:
    """Say what a node says of itself whose clock, on one of them, is two minutes ahead."""
    told = describe_node()
    ahead = 120.0 if os.environ.get("MST_TEST_NODE") == "second" else 0.0
    return {**told, "name": os.environ["MST_TEST_NODE"], "clock": told["clock"] + ahead}


def test_when_a_cell_began_and_ended_is_told_by_one_clock() -> None:
    machine = replace(A100, clock_offset_seconds=3661.5)
    found = on_our_clock(measured(machine=machine))

    assert (found.began, found.ended) == ("2026-11-27T08:58:58+00:00", "2026-11-27T09:00:58+00:00")
    assert found.repeats == measured().repeats
    assert on_our_clock(measured()) == measured()


def test_clocks_that_differ_are_told_of() -> None:
    well, behind = Node("a", "ward-1", 0.02, "0.1.0"), Node("b", "ward-2", -3.5, "0.2.0")

    assert clock_offset(100.0, 103.5, 101.0) == 3.0
    assert node_notes(well, "0.1.0") == []
    assert "the clock of ward-2 is 3.5 s behind" in node_notes(behind, "0.1.0")[0]
    assert node_notes(behind, "0.1.0")[1] == "ward-2 has mst 0.2.0, this machine 0.1.0"


def test_a_device_is_held_by_one_cell_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    got: list[int] = []

    def third() -> None:
        with free_device("simchip", 3, 1, "node") as index:
            got.append(index)

    with free_device("simchip", 3, 2, "node") as pair, free_device("simchip", 3, 1, "node") as one:
        waiting = threading.Thread(target=third)
        waiting.start()
        time.sleep(0.1)
        before = list(got)
    waiting.join(10)

    assert (pair, one, before, got) == (0, 2, [], [0])


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install \"mst-train\[bench\]\""):
        connect("auto")


@WITH_RAY
@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("127.0.0.1:1", ClusterError, "no Ray head answers at"),
        ("a..b:6379", ClusterError, "no Ray head answers at"),
        ("somewhere", UsageError, "takes auto or HOST:PORT"),
        ("here:99999", UsageError, "takes auto or HOST:PORT"),
    ],
)
def test_a_head_that_does_not_answer_is_named(
    address: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        connect(address)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head with an Ascend, and two machines with a SimChip each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    def node(environ: dict[str, str], mark: str, **devices: float) -> dict[str, Any]:
        kept = {name: value for name, value in environ.items() if os.environ.get(name) != value}
        return {
            "num_cpus": 1,
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
            "resources": {f"mst-{name}": count for name, count in devices.items()},
            "env_vars": {**kept, "MST_TEST_NODE": mark, "OMP_NUM_THREADS": "1"},
        }

    sim, ascend = simchip_environment(), ascend_environment(tmp_path_factory.mktemp("npu"), 1)
    made = Cluster(initialize_head=True, head_node_args=node(ascend, "head", ascend=1))
    try:
        made.first = made.add_node(**node(sim, "first", simchip=1))
        made.second = made.add_node(**node(sim, "second", simchip=1))
        yield made
    finally:
        made.shutdown()


def training_on(mark: str) -> list[psutil.Process]:
    """Return the processes that train on a node."""
    found = []
    for each in psutil.process_iter():
        try:
            if "train" in each.cmdline() and each.environ().get("MST_TEST_NODE") == mark:
                found.append(each)
        except (psutil.Error, OSError):
            continue
    return found


@WITH_RAY
def test_cells_are_spread_and_a_node_that_dies_loses_only_its_own(
    cluster: Any, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    matrix = Matrix(
        models=(str(tiny_model),), lengths=(48, 64), batches=("2",),
        methods=(Method("lora", METHODS["lora"]),), devices=("simchip", "npu", "tpu"),
        options={"threads": "1", "dtype": "float32"},
        procedure=Procedure((str(chat_rows),), steps=2, warm_up=1, repeats=1),
    )  # fmt: skip
    cells = [each for each in cells_of(matrix) if each.device != "npu" or each.length == 64]
    wish = Wish(matrix, tmp_path, os.environ, ("--jail", "auto"), ray=cluster.address)
    orphans: list[psutil.Process] = []
    over = threading.Event()

    def kill_the_first() -> None:
        while not orphans and not over.is_set():
            orphans.extend(training_on("first"))
            time.sleep(0.1)
        cluster.remove_node(cluster.first, allow_graceful=False)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    notes: list[str] = []
    found: dict[tuple[str, int], Measured] = {}
    try:
        told = on_cluster(wish, cells, lambda cell, words: None, notes, describe=told_too_late)
        for each in told:
            found[each.cell.device, each.cell.length] = each
    finally:
        over.set()
        killer.join()
    lost = "measured again: the first node was lost"
    again = [each for each in found.values() if lost in each.notes]

    assert {key: each.status for key, each in found.items()} == {
        ("simchip", 48): "done", ("simchip", 64): "done", ("npu", 64): "done",
        ("tpu", 48): "absent", ("tpu", 64): "absent",
    }, {each.reason for each in found.values()}  # fmt: skip
    assert orphans
    assert len(again) == 1
    assert (again[0].machine and again[0].machine.device) == "simchip:0"
    assert "the cluster has ascend × 1, simchip × 2" in found["tpu", 64].reason
    npu = found["npu", 64].machine
    assert npu is not None
    assert (npu.device, npu.chip[:9]) == ("ascend:0", "Ascend910")
    assert npu.clock_offset_seconds is not None
    assert abs(npu.clock_offset_seconds) < 0.5
    assert [each.partition(":")[0] for each in notes] == ["the clock of second is 120.0 s ahead"]
    late = [each for each in found.values() if each.machine and each.machine.device == "simchip:0"]
    assert {round(each.machine.clock_offset_seconds or 0) for each in late if each.machine} == {120}
    # Its own clock is right, so what is told by ours now lies two minutes back.
    before = datetime.now(timezone.utc) - timedelta(seconds=110)
    assert all(datetime.fromisoformat(each.ended) < before for each in late)
    # The run of the node that died has died with it.
    assert psutil.wait_procs(orphans, timeout=20)[1] == []
