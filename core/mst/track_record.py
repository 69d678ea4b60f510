"""The forecast's own record: what it said and what was measured, over the runs that are here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mst import rundir
from mst.errors import MstError
from mst.plan import Plan
from mst.rundir import ForecastMiss


@dataclass(frozen=True)
class Entry:
    """One run, or one attempt of it that ran out of memory.

    Attributes:
        run: its directory.
        tuner: as in the plan.
        micro_batch: rows.
        forecast_bytes: predicted peak.
        measured_bytes: measured peak; of a miss, what was in use when memory ran out.
        forecast_seconds: predicted seconds of a step.
        measured_seconds: measured.
        missed: it ran out of memory.
    """

    run: str
    tuner: str
    micro_batch: int
    forecast_bytes: int
    measured_bytes: int | None
    forecast_seconds: float | None
    measured_seconds: float | None
    missed: bool


@dataclass(frozen=True)
class Summary:
    """How good the forecasts were.

    Attributes:
        runs: that were measured.
        misses: attempts that ran out of memory.
        median_error: median of |forecast / measured - 1| of memory; None without runs.
        worst_under: the largest share by which memory was forecast too low, at least 0.
        median_time_ratio: median of forecast over measured seconds.
    """

    runs: int
    misses: int
    median_error: float | None
    worst_under: float | None
    median_time_ratio: float | None


def entries(directory: Path) -> tuple[Entry, ...]:
    """Return an entry for every run under `directory` that was measured, and for every miss."""
    found: list[Entry] = []
    for path in sorted(directory.glob(f"*/{rundir.MANIFEST}")):
        try:
            manifest = rundir.read_manifest(path.parent)
            plan = rundir.read_document(Plan, path.parent, rundir.PLAN)
        except MstError:
            continue  # `mst runs list` says what is wrong with it
        found.extend(_missed(path.parent.name, plan, each) for each in manifest.misses)
        results = manifest.results
        if "peak_memory_bytes" not in results:
            continue
        found.append(
            Entry(
                run=path.parent.name,
                tuner=plan.tuner,
                micro_batch=plan.per_device_train_batch_size,
                forecast_bytes=int(results["predicted_memory_bytes"]),
                measured_bytes=int(results["peak_memory_bytes"]),
                forecast_seconds=plan.time.step_seconds if plan.time else None,
                measured_seconds=results.get("step_seconds"),
                missed=False,
            )
        )
    return tuple(found)


def _missed(run: str, plan: Plan, miss: ForecastMiss) -> Entry:
    return Entry(
        run=run,
        tuner=plan.tuner,
        micro_batch=miss.micro_batch,
        forecast_bytes=miss.forecast_bytes,
        measured_bytes=miss.measured_bytes,
        forecast_seconds=None,
        measured_seconds=None,
        missed=True,
    )


def summary(found: Sequence[Entry]) -> Summary:
    """Return how good the forecasts were, over runs that ended."""
    measured = [(one.forecast_bytes, one.measured_bytes) for one in found if not one.missed]
    ratios = [forecast / peak for forecast, peak in measured if peak]
    times = [
        one.forecast_seconds / one.measured_seconds
        for one in found
        if one.forecast_seconds and one.measured_seconds
    ]
    return Summary(
        runs=len(ratios),
        misses=sum(one.missed for one in found),
        median_error=statistics.median(abs(each - 1) for each in ratios) if ratios else None,
        worst_under=max(0.0, *(1 - each for each in ratios)) if ratios else None,
        median_time_ratio=statistics.median(times) if times else None,
    )
