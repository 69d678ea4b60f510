"""Cells of a benchmark as they are measured, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mst.bench.cells import Cell
from mst.bench.matrix import PROCEDURE
from mst.bench.procedure import Procedure
from mst.bench.results import (
    DONE,
    FORECAST,
    Exported,
    Forecast,
    Machine,
    Measured,
    Peak,
    Repeat,
    Results,
    Served,
    Setting,
)

GIB = 2**30
CPU = Machine("ward-1", "Linux 6.8 x86_64", "cpu:0", "AMD EPYC 9555", "", 32 * GIB)
A100 = Machine("ward-2", "Linux 6.8 x86_64", "cuda:0", "NVIDIA A100-SXM4-80GB", "570.1", 80 * GIB)
SETTING = Setting(
    "lora", "none", "single", 1, "bfloat16", "bfloat16", "sdpa", "adamw_torch", 4, 1, False, False,
    2,
)  # fmt: skip


def cell(**changes: Any) -> Cell:
    """Return a cell of LoRA on the CPU."""
    known: dict[str, Any] = {
        "model": "smollm2", "method": "lora", "options": {"tuner": "lora"}, "length": 512,
        "batch": "4", "device": "cpu",
    }  # fmt: skip
    procedure = {name: changes.pop(name) for name in PROCEDURE if name in changes}
    return Cell(**{**known, **changes}, procedure=Procedure(**procedure))


def repeat(
    tokens_per_second: float = 1000.0, steps: int = 4, jitter: float = 0.01, **changes: Any
) -> Repeat:
    """Return a run whose steps of 2,000 tokens take turns at being a little faster and slower."""
    seconds = 2000 / tokens_per_second
    took = tuple(seconds * (1 + jitter * (-1) ** step) for step in range(steps))
    return replace(Repeat(took, 2000 * steps, 2.5, 2.75, 3 * GIB, 30.0, load_before=0.5), **changes)


def measured(
    speeds: Sequence[float] = (1000.0, 1010.0, 990.0), machine: Machine | None = CPU, **changes: Any
) -> Measured:
    """Return a cell with a run of each of these speeds, exported and served."""
    asked = changes.pop("cell", None) or cell()
    known = Measured(
        asked.id,
        asked,
        DONE,
        machine=machine,
        began="2026-11-27T10:00:00+00:00",
        ended="2026-11-27T10:02:00+00:00",
        repeats=tuple(map(repeat, speeds)),
        setting=SETTING,
        forecast=Forecast(int(3.1 * GIB), 2.1, 950.0, 1.5, "table: here"),
        peak=Peak(1.0, "table: a data sheet", 0.8),
        flop_per_token=4e8,
        energy_reason="no RAPL driver",
        exported=(Exported("merged", "passed", "", 12.5, GIB, 1.0, 1e-6, 1.0),),
        served=(
            Served("run", 1, "", 2, 0, 64, 20.0, 0.5, 0.6),
            Served("run", 8, "", 16, 1, 480, 90.0, 0.9, 1.4),
        ),
        versions={"python": "3.11.9", "torch": "2.13.0"},
        mst_version="0.1.0",
        commit="c" * 40,
        jail="user-namespace",
    )
    return replace(known, **changes)


def failed(status: str, reason: str, **changes: Any) -> Measured:
    """Return a cell that has no figures."""
    asked = changes.pop("cell", None) or cell()
    return replace(Measured(asked.id, asked, status, reason, CPU), **changes)


def forecast(speed: float = 20_000.0) -> Measured:
    """Return what the planner expects of an A100 that is not here."""
    return replace(
        measured((), replace(A100, node="", device="a100-80gb")),
        status=FORECAST,
        forecast=Forecast(6 * GIB, 0.1, speed, 1.5, "table: a README"),
        exported=(),
        served=(),
        energy_reason="",
    )


def results(*cells: Measured, name: str = "wards") -> Results:
    """Return a bench of these cells."""
    return Results(name, "2026-11-27T10:00:00+00:00", cells)
