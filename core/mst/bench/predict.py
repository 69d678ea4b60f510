"""What the planner expects of cells on hardware that is not here; never mixed with what was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import mst
from mst import rundir
from mst.bench.cells import Cell, request_values, rows_of
from mst.bench.figures import forecast_of, model_flop, setting_of
from mst.bench.results import FORECAST, Machine, Measured, Peak
from mst.errors import PlanError
from mst.hardware import read_hardware
from mst.inputs import with_defaults
from mst.job import prepare_job
from mst.registry import load
from mst.request import TrainRequest
from mst.workload import mean_label_tokens, mean_length


def forecasts(
    cells: Iterable[Cell],
    hardware: Iterable[str],
    environ: Mapping[str, str],
    tell: Callable[[str], None] = lambda words: None,
) -> list[Measured]:
    """Return the forecast of each cell on each machine that was named.

    Cells that differ in their device alone have one forecast. One that fits in no way has the
    planner's reason in place of figures.

    Args:
        cells: of the matrix.
        hardware: as `mst plan --on` takes it.
        environ: for finding models.
        tell: is called with what is done at the moment.

    Raises:
        MstError: a machine is not in the catalogue, or a model or data set is not here.
    """
    registry = load()
    for each in hardware:  # a misspelt one is told of before any work
        read_hardware(each, registry)
    alike = {(each.model, each.method, each.length, each.batch): each for each in cells}
    found = []
    for on in hardware:
        for cell in alike.values():
            tell(f"{cell.model}, {cell.method}, {cell.length} on {on}")
            found.append(_forecast(replace(cell, device="auto"), on, environ))
    return found


def _forecast(cell: Cell, on: str, environ: Mapping[str, str]) -> Measured:
    chip = read_hardware(on, load()).devices[0]
    machine = Machine("", "", on, chip.name, "", chip.memory_total_bytes)
    known = Measured(
        cell.id, cell, FORECAST, machine=machine, mst_version=mst.__version__, began=rundir.now()
    )
    request = train_request(cell)
    given = frozenset(request_values(cell))
    try:
        job = prepare_job(with_defaults(request, given), environ, on=on)
    except PlanError as error:
        return replace(known, reason=str(error))
    plan, data = job.plan, job.data
    tokens = mean_length(data)
    setting = setting_of(plan)
    return replace(
        known,
        setting=setting,
        forecast=forecast_of(plan, tokens * plan.global_batch, plan.memory.peak_bytes),
        peak=Peak(
            catalogue_tflops=chip.peak_tflops.get(setting.compute_dtype),
            source=chip.sources.get("peak_tflops", "unknown"),
        ),
        flop_per_token=model_flop(job.model, plan, job.request, mean_label_tokens(data) / tokens),
    )


def train_request(cell: Cell) -> TrainRequest:
    """Return what `mst train` is asked for a cell.

    Raises:
        UsageError: an option doesn't take its value.
    """
    from mst.cli.options import convert

    values = {name: convert(name, one, name) for name, one in request_values(cell).items()}
    values["dataset"] = rows_of(cell)
    return TrainRequest(**values)
