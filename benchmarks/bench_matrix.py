"""What `mst bench` itself costs: rendering many cells, and handing cells to a Ray cluster.

`python -m benchmarks.bench_matrix [--cells 1000] [--nodes 4] [--tasks 100] [--task-seconds 1]`
prints a JSON line for reading and rendering a file of so many cells, each with three repeats of ten
steps, and one for so many cells that do nothing but wait, on a cluster of so many simulated nodes
on this machine: the seconds that they took beside those that they would have taken without any
scheduling. Without the extra `bench` there is no second line.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.train_throughput import busy_share
from mst import rundir, serial
from mst.bench.cells import Cell
from mst.bench.figures import Prices
from mst.bench.job import Wish
from mst.bench.lines import csv_text
from mst.bench.matrix import Matrix
from mst.bench.page import page
from mst.bench.procedure import Procedure
from mst.bench.result_file import read_results, write_results
from mst.bench.results import DONE, Forecast, Machine, Measured, Peak, Repeat, Results, Setting
from mst.bench.table import show_results

CHIPS = ("AMD EPYC 9555", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 3090", "Ascend910B3")


def made_up(number: int) -> Measured:
    """Return a cell such as a bench has it; its figures are nobody's."""
    asked = Cell(
        f"model-{number % 5}", f"method-{number % 4}", {"tuner": "lora"}, 2 << number % 10,
        str(1 + number % 3), "cuda", procedure=Procedure(seed=number),
    )  # fmt: skip
    seconds = tuple(0.1 * (1 + (number + step) % 7 / 100) for step in range(10))
    repeat = Repeat(seconds, 20480, 2.5, 2.7, 2**33, 40.0, 900.0, 71.0, (), 0.4, 0.01)
    chip = CHIPS[number % len(CHIPS)]
    setting = Setting(
        "lora", "none", "single", 1, "bfloat16", "bfloat16", "sdpa", "adamw_torch", 4, 1, False,
        False, 8,
    )  # fmt: skip
    return Measured(
        asked.id, asked, DONE, machine=Machine(f"node-{number % 8}", "Linux", "cuda:0", chip),
        began=rundir.now(), ended=rundir.now(), repeats=(repeat,) * 3, setting=setting,
        forecast=Forecast(2**33, 0.1, 20000.0, 1.5, "table"), peak=Peak(312.0, "table", 250.0),
        flop_per_token=1e9, versions={"python": "3.11.7", "torch": "2.13.0"}, mst_version="0.1.0",
        commit="0" * 40, jail="user-namespace",
    )  # fmt: skip


def rendering(count: int) -> dict[str, Any]:
    """Return the seconds that reading and rendering take."""
    from rich.console import Console

    prices = Prices({"a100": 3.0, "3090": 0.5}, 0.3, "EUR")
    results = Results("made up", rundir.now(), tuple(map(made_up, range(count))))
    line: dict[str, Any] = {"case": "rendering", "cells": count}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "results.json"
        write_results(file, results)
        line["file_bytes"] = file.stat().st_size
        line["read_seconds"], read = timed(lambda: read_results(file))
    console = Console(file=io.StringIO(), width=200)
    line["page_seconds"], text = timed(lambda: page(read, prices))
    line["page_bytes"] = len(text.encode())
    line["csv_seconds"], _ = timed(lambda: csv_text(read, prices))
    line["terminal_seconds"], _ = timed(lambda: show_results(console, read, prices))
    return line


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long a call takes, and what it returns."""
    began = time.perf_counter()
    found = call()
    return round(time.perf_counter() - began, 3), found


def wait(cell: str, backend: str, node: str, seal: tuple[str, ...], keep: Mapping[str, Any]) -> str:
    """Stand for a cell on a node: wait as long as its timeout says."""
    asked = serial.loads(Cell, cell)
    time.sleep(asked.procedure.timeout_seconds)
    return serial.dumps(Measured(asked.id, asked, DONE, reason=node))


def scheduling(nodes: int, tasks: int, seconds: float) -> dict[str, Any]:
    """Return what handing over cells costs, over the seconds of the cells themselves."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    from mst.bench.ray_cluster import on_cluster

    kept: dict[str, Any] = {
        "num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False,
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=kept)
    try:
        for _ in range(nodes):
            cluster.add_node(**kept, resources={"mst-simchip": 1})
        cells = [
            replace(
                made_up(number).cell,
                device="simchip",
                procedure=Procedure(seed=number, timeout_seconds=seconds),
            )
            for number in range(tasks)
        ]
        wish = Wish(Matrix(), Path("."), os.environ, ray=cluster.address)
        ends: list[float] = []
        began = time.perf_counter()
        spread: dict[str, int] = {}
        for each in on_cluster(wish, cells, lambda cell, words: None, [], wait):
            ends.append(time.perf_counter())
            spread[each.reason] = spread.get(each.reason, 0) + 1
    finally:
        cluster.shutdown()
    alone = tasks / nodes * seconds
    # Connecting and starting a process on each node is paid once, whatever the cells take.
    steady = (ends[-1] - ends[nodes - 1]) / ((tasks - nodes) / nodes * seconds) - 1
    return {
        "case": "scheduling", "nodes": nodes, "cells": tasks, "cell_seconds": seconds,
        "cells_a_node": sorted(spread.values()), "seconds": round(ends[-1] - began, 2),
        "seconds_without_scheduling": round(alone, 2), "overhead": round(steady, 4),
        "overhead_with_connecting": round((ends[-1] - began) / alone - 1, 4),
    }  # fmt: skip


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--task-seconds", type=float, default=1.0)
    args = parser.parse_args()
    busy = round(busy_share(), 3)
    print(json.dumps(rendering(args.cells) | {"busy_share_before": busy}), flush=True)
    if importlib.util.find_spec("ray"):
        line = scheduling(args.nodes, args.tasks, args.task_seconds)
        print(json.dumps(line | {"busy_share_before": busy}), flush=True)


if __name__ == "__main__":
    main()
