"""One cell on one device of this machine: its runs, its exports, its servers."""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import mst
from mst import rundir, serial
from mst.bench import figures
from mst.bench.cells import Cell, train_arguments
from mst.bench.meters import EnergyMeter, asking, busy_share, load_average
from mst.bench.process import Ended, Steps, mst_command, run_watched
from mst.bench.results import (
    ABSENT,
    DONE,
    FAILED,
    MEMORY,
    REFUSED,
    TIMEOUT,
    TOO_LARGE,
    Exported,
    Forecast,
    Machine,
    Measured,
    Peak,
    Repeat,
    Served,
    with_notes,
)
from mst.errors import EXIT_OUT_OF_MEMORY, MstError
from mst.facts import DeviceFacts, MachineFacts
from mst.plan import Plan
from mst.registry import Registry
from mst.rundir import RunManifest
from mst.versions import commit

_REASON = 600
_UNSEEN = "the steps were too short to be seen, or there was no warm-up before them"
Tell = Callable[[str], None]
PeakOf = Callable[[DeviceFacts, str, int], tuple[float | None, str]]


@dataclass(frozen=True)
class Place:
    """Where and how cells are measured.

    Attributes:
        directory: of this bench on this machine.
        machine: its facts.
        registry: its plugins.
        environ: of what is started.
        seal: options of the jail and the audit log, for every command.
        peak_of: measures the product of a device in a dtype, on so many threads of a CPU; returns
            TFLOPS, or why not.
        keep_runs: run directories are not removed.
        until: `time.monotonic()` after which no further repeat, export or server is begun.
        peers: the interpreter of each peer.
    """

    directory: Path
    machine: MachineFacts
    registry: Registry
    environ: Mapping[str, str]
    seal: tuple[str, ...]
    peak_of: PeakOf
    keep_runs: bool = False
    until: float | None = None
    peers: Mapping[str, str] = field(default_factory=dict)


def run_cell(cell: Cell, place: Place, tell: Tell = lambda stage: None) -> Measured:
    """Measure a cell and return what came of it; what goes wrong is its status.

    Args:
        cell: to measure.
        place: where.
        tell: is called with what is done at the moment.
    """
    began = rundir.now()
    found = Measured(
        cell.id, cell, DONE, began=began, mst_version=mst.__version__, commit=commit(),
        versions={"python": platform.python_version()},
    )  # fmt: skip
    device, missing = _device(cell, place.machine)
    if device is None:
        return replace(found, status=ABSENT, reason=missing, ended=rundir.now())
    found = replace(found, machine=machine_of(place.machine, device))
    work = place.directory / "cells" / cell.id
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        found = _measured(cell, place, device, work, found, tell)
    finally:
        if not place.keep_runs:
            shutil.rmtree(work, ignore_errors=True)
    return replace(found, ended=rundir.now())


def machine_of(facts: MachineFacts, device: DeviceFacts) -> Machine:
    """Return what a result says of the machine and the device."""
    return Machine(
        node=platform.node(),
        platform=facts.platform,
        device=f"{device.backend}:{device.index}",
        chip=device.name,
        driver=device.driver,
        memory_bytes=device.memory_total_bytes,
    )


def _device(cell: Cell, machine: MachineFacts) -> tuple[DeviceFacts | None, str]:
    """Return the first device of a cell, or why it isn't here."""
    from mst.probe import select_devices

    try:
        return select_devices(machine, cell.device, cell.devices)[1][0], ""
    except MstError as error:
        return None, str(error)


def _measured(
    cell: Cell, place: Place, device: DeviceFacts, work: Path, found: Measured, tell: Tell
) -> Measured:
    for number in range(1, cell.procedure.repeats + 1):
        if found.repeats and _out_of_time(place):
            words = f"{len(found.repeats)} of {cell.procedure.repeats} repeats: no time"
            found = with_notes(found, words)
            break
        run = work / f"repeat-{number}"
        tell(f"repeat {number} of {cell.procedure.repeats}")
        found = _repeat(cell, place, device, run, found, tell)
        if found.status != DONE:
            return found
        if number > 1 and not place.keep_runs:
            shutil.rmtree(work / f"repeat-{number - 1}", ignore_errors=True)
    run = work / f"repeat-{len(found.repeats)}"
    found = _described(run, place, device, found, tell)
    return _with_products(cell, place, run, work, found, tell)


def _out_of_time(place: Place) -> bool:
    return place.until is not None and time.monotonic() > place.until


def _repeat(
    cell: Cell, place: Place, device: DeviceFacts, run: Path, found: Measured, tell: Tell
) -> Measured:
    """Return the cell with one more run, or with why there is none."""
    how = cell.procedure
    load, busy = load_average(), busy_share()
    meter = EnergyMeter(asking(place.registry, device))

    def step(number: int) -> None:
        if number == how.warm_up:
            meter.begin()
        elif number == how.warm_up + how.steps:
            meter.read()
        tell(f"{run.name}, step {number} of {how.warm_up + how.steps}")

    steps = Steps(run, step)

    def look() -> None:
        steps.look()
        if how.warm_up <= steps.done < how.warm_up + how.steps and meter.due():
            meter.read()

    if how.warm_up == 0:  # when the first step begins is not seen: energy is not told then
        meter.begin()
    command = mst_command(*_arguments(cell, place, run), *place.seal)
    ended = run_watched(command, _log(run), place.environ, how.timeout_seconds, look)
    status, reason = outcome(ended, run)
    if status != DONE:
        return replace(found, status=status, reason=_cut(reason), energy_reason="")
    told = figures.repeat_of(run, how.warm_up, ended.seconds)
    joules = meter.joules if meter.covers(sum(told.step_seconds)) else None
    repeat = replace(
        told,
        energy_joules=joules,
        temperature_celsius=meter.hottest,
        throttled=tuple(meter.throttled),
        load_before=load,
        busy_before=busy,
    )
    energy_reason = "" if joules is not None else meter.reason or _UNSEEN
    noisy = f"others used {busy:.0%} of the machine before a repeat" if busy > figures.BUSY else ""
    hot = f"slowed down: {', '.join(meter.throttled)}" if meter.throttled else ""
    notes = [each for each in (noisy, hot) if each and each not in found.notes]
    return replace(
        found,
        repeats=(*found.repeats, repeat),
        energy_reason=energy_reason,
        notes=(*found.notes, *notes),
    )


def _arguments(cell: Cell, place: Place, run: Path) -> list[str]:
    """Return the command that trains a cell once, in mst or in its peer."""
    if not cell.peer:
        return ["train", *train_arguments(cell, run)]
    file = run.with_name("cell.json")
    file.write_text(serial.dumps(cell), encoding="utf-8")
    python = f"{cell.peer}={place.peers[cell.peer]}"
    return [
        "bench", "peer", str(file), "--output-dir", str(run), "--peer", cell.peer,
        "--peer-python", python, "--json",
    ]  # fmt: skip


def _log(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def _cut(text: str) -> str:
    return text if len(text) <= _REASON else text[: _REASON - 2] + " …"


def outcome(ended: Ended, run: Path) -> tuple[str, str]:
    """Return the status that the end of `mst train` gives its cell, and the reason."""
    if ended.late:
        return TIMEOUT, f"ended after {ended.seconds:.0f} s without coming to its end"
    if ended.code == 0:
        return DONE, ""
    reason = ended.message or f"the command ended with code {ended.code}"
    if ended.code == EXIT_OUT_OF_MEMORY or _ran_out(run):
        return MEMORY, reason
    known = {
        "NothingFits": TOO_LARGE, "NoDeviceError": ABSENT, "PeerAbsent": ABSENT,
        "PlanError": REFUSED, "PeerRefused": REFUSED,
    }  # fmt: skip
    return known.get(ended.error, FAILED), f"{ended.error}: {reason}" if ended.error else reason


def _ran_out(run: Path) -> bool:
    """Return whether a run has recorded that memory ran out, or that the kernel killed it."""
    with contextlib.suppress(MstError):
        return bool(rundir.read_manifest(run).misses)
    return False


def _described(
    run: Path, place: Place, device: DeviceFacts, found: Measured, tell: Tell
) -> Measured:
    """Return the cell with what its last run says of itself, and the device's peak."""
    manifest, plan = rundir.read_manifest(run), figures.machine_plan(run)
    setting = figures.setting_of(plan)
    if found.cell.peer:  # that is mst's own doing
        setting = replace(setting, compiled=False)
    tell(f"the product of {device.backend}:{device.index} in {setting.compute_dtype}")
    measured, why = place.peak_of(device, setting.compute_dtype, setting.threads)
    few = figures.rows_lacking(found.cell, plan, found.repeats[-1])
    return replace(
        found,
        setting=setting,
        forecast=None if found.cell.peer else _forecast(manifest, plan, found.repeats[-1]),
        peak=Peak(
            catalogue_tflops=device.peak_tflops.get(setting.compute_dtype),
            source=device.sources.get("peak_tflops", "unknown"),
            measured_tflops=measured,
            reason=why,
        ),
        flop_per_token=figures.flop_per_token(run, manifest),
        versions=dict(manifest.versions),
        jail=figures.jail_of(run),
        notes=(*found.notes, few) if few else found.notes,
    )


def _forecast(manifest: RunManifest, plan: Plan, last: Repeat) -> Forecast:
    memory = int(manifest.results["predicted_memory_bytes"])
    return figures.forecast_of(plan, last.tokens / len(last.step_seconds), memory)


def _with_products(
    cell: Cell, place: Place, run: Path, work: Path, found: Measured, tell: Tell
) -> Measured:
    """Return the cell with its exports, and with servers of the run and of each export."""
    from mst.bench.products import export_run, serve_target

    exported: list[Exported] = []
    served: list[Served] = []

    def serve(target: Path, name: str) -> None:
        if cell.procedure.serving and not _out_of_time(place):
            tell(f"serving {name}")
            served.extend(serve_target(cell, place, target, name, work / f"serve-{name}"))

    serve(run, "run")
    for each in cell.procedure.exports:
        if _out_of_time(place):
            found = with_notes(found, f"not exported as {each}: no time")
            continue
        tell(f"exporting as {each}")
        made, directory = export_run(cell, place, run, each, work / f"export-{each}")
        exported.append(made)
        if made.status == "passed":
            serve(directory, each)
        if not place.keep_runs:
            shutil.rmtree(work / f"export-{each}", ignore_errors=True)
    return replace(found, exported=tuple(exported), served=tuple(served))
