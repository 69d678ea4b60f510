"""An export from the run to its artefacts: what is checked before any work, then the work."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mst import rundir, serial
from mst.errors import EXIT_INTERRUPTED, EXIT_REFUSED, Interrupted, MstError, RunError, UsageError
from mst.export import ExportPlan, ExportRequest
from mst.export.rows import check_calibration, rows_of
from mst.launch import how_it_ended, run_worker, worker_environment
from mst.merge import (
    REPORT,
    SIDE_FILES_BYTES,
    MergeReport,
    check_space,
    claimed,
    merge_claimed,
    prepare_merge,
    stored_dtype,
)
from mst.model.facts import read_facts
from mst.plan import Plan
from mst.probe import host_facts
from mst.quantities import FLOAT_BYTES, gib
from mst.registry import Registry, guarded
from mst.seal.keys.ring import NO_KEYS, KeyRing, handed_down
from mst.training import checkpoint
from mst.training.sealed_directory import MANIFEST
from mst.tuned import TunedModel, of_run

# Where the merge lies that all formats share; a later export finds it there.
MERGED = ".merged"
PASSED, FAILED = "passed", "failed"
# As many as the GPTQ paper's 128 sequences (Frantar et al. 2022, section 4).
CALIBRATION_ROWS = 128


@dataclass(frozen=True)
class ExportOptions:
    """What `mst export` was asked, beside the run; None and "auto" leave it to the target.

    Attributes:
        formats: names of targets.
        output_dir: a directory for each format is made in it; None for RUN/export.
        which: a checkpoint, as `mst.tuned.of_run` takes it.
        dtype: of the merged weights, as `mst merge` takes it.
        method: how numbers are chosen.
        bits: of a weight.
        group_size: weights that share a scale.
        calibration: files to calibrate by; empty for rows of the run.
        calibration_rows: at most so many.
        options: of the targets: name to value.
    """

    formats: tuple[str, ...] = ("merged",)
    output_dir: str | None = None
    which: str | None = None
    dtype: str = "auto"
    method: str = "auto"
    bits: int | None = None
    group_size: int | None = None
    calibration: tuple[str, ...] = ()
    calibration_rows: int = CALIBRATION_ROWS
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetJob:
    """What one target is to do; all paths are absolute.

    Attributes:
        name: of the target.
        plan: that it gave.
        directory: of the artefact.
    """

    name: str
    plan: ExportPlan
    directory: str


@dataclass(frozen=True)
class ExportJob:
    """An export that was checked; the worker gets it as JSON.

    Attributes:
        run: the run directory.
        source: what the run made.
        options: what was asked, with absolute paths.
        merged: directory of the merged model, made before the worker starts.
        targets: in the order of the formats.
        attention: transformers' attention implementation.
        threads: CPU threads.
        beside: whether memory allows comparing while a target quantizes.
    """

    run: str
    source: TunedModel
    options: ExportOptions
    merged: str
    targets: tuple[TargetJob, ...]
    attention: str
    threads: int
    beside: bool


def prepare_export(
    run: Path, options: ExportOptions, registry: Registry, keys: KeyRing = NO_KEYS
) -> ExportJob:
    """Check that an export can work, without torch, and say what each target will do.

    Raises:
        MstError: the run, its rows, a target, the output directory, the disk or the memory stands
            in the way.
    """
    source = of_run(run, options.which, keys)
    plan = rundir.read_document(Plan, run, rundir.PLAN)
    place = Path(options.output_dir or run / "export").absolute()
    facts = read_facts(Path(source.weights))
    dtype = stored_dtype(facts, source, plan, options.dtype)
    targets = []
    for name in dict.fromkeys(options.formats):
        request = request_for(options, source.weights, dtype=dtype)
        made = ask(registry, name, "mst_export_check", request=request)
        if not isinstance(made, ExportPlan):
            raise MstError(f"the export target {name!r} answered with no ExportPlan.")
        directory = place / name
        refuse_existing(directory)
        targets.append(TargetJob(name, made, str(directory)))
    # Two copies in float32 are compared, whatever the target is, and the merge as it is stored.
    stored = FLOAT_BYTES[dtype] * facts.parameters
    comparing = 8 * facts.parameters + stored
    making = max(each.plan.memory_bytes for each in targets)
    free = _free_memory(max(comparing, making), registry)
    # Whether it is whole is asked when it is needed: that reads all of it.
    merge = 0 if (place / MERGED / REPORT).is_file() else stored + SIDE_FILES_BYTES
    what = "the export with the merge that it is made of" if merge else "the export"
    check_space(place, merge + _disk_bytes([each.plan for each in targets]), what)
    absolute = _absolute(options)
    # What stands in the way of the rows is said before the merge; the worker reads them again.
    rows = rows_of(
        run,
        Path(source.tokenizer),
        absolute.calibration,
        options.calibration_rows,
        registry,
        keys,
    )
    if any(each.plan.calibrated for each in targets):
        check_calibration(rows.calibration)
    return ExportJob(
        run=str(run.absolute()),
        source=source,
        options=absolute,
        merged=str(place / MERGED),
        targets=tuple(targets),
        attention=plan.attention,
        threads=plan.threads,
        beside=free is not None and comparing + making <= free,
    )


def _disk_bytes(plans: Sequence[ExportPlan]) -> int:
    """Return what artefacts, made one after another, take of the disk beside the merge."""
    artefacts = sum(0 if each.shares_merge else each.disk_bytes for each in plans)
    return artefacts + max(each.work_bytes for each in plans)


def request_for(options: ExportOptions, model_dir: str, **others: Any) -> ExportRequest:
    """Return what a target is asked."""
    return ExportRequest(
        model_dir=model_dir,
        method=options.method,
        bits=options.bits,
        group_size=options.group_size,
        options=dict(options.options),
        **others,
    )


def ask(registry: Registry, name: str, hook: str, **arguments: Any) -> Any:
    """Return what a target's hook returns.

    Raises:
        UsageError: there is no such target.
        MstError: the hook raised.
    """
    relay = registry.exports.get(name)
    if relay is None:
        known = ", ".join(sorted(registry.exports)) or "none"
        raise UsageError(
            f"--format {name} was asked for; the export targets here are {known}. `mst plugins`"
            " says why one is missing."
        )
    return guarded(lambda: getattr(relay, hook)(**arguments), seconds=None)


def refuse_merged(run: Path) -> None:
    """Make sure that what was named as a run is not a merged model.

    Raises:
        RunError: it is one; names the run that it came from.
    """
    if (run / REPORT).is_file() and not (run / rundir.MANIFEST).is_file():
        made = serial.load(MergeReport, run / REPORT)
        raise RunError(
            f"{run} is a merged model, and an export needs the run that it came from, {made.run}:"
            " it is compared with what was trained, on the rows that were held out. Pass the run."
        )


def refuse_existing(directory: Path) -> None:
    """Make sure that an export overwrites nothing but one that has failed its comparison.

    Raises:
        RunError: something else is there.
    """
    if directory.exists() and _status(directory) != FAILED:
        raise RunError(
            f"{directory} is there already and is never overwritten. Remove it, or pass another"
            " --output-dir."
        )


def _status(directory: Path) -> str | None:
    try:
        found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("status") if isinstance(found, dict) else None


def _free_memory(needed: int, registry: Registry) -> int | None:
    """Return the bytes that are free, None where nobody knows.

    Raises:
        MstError: they are fewer than needed.
    """
    host = host_facts(registry)
    free = host.memory_free_bytes if host else None
    if host is not None and free is not None and needed > free:
        raise MstError(
            f"comparing the export with what was trained takes {gib(needed)} of memory, and"
            f" {gib(free)} are free ({host.sources['memory_free_bytes']}). Export on a machine"
            " with more memory, raise the limit of this container, or end other programs."
        )
    return free


def _absolute(options: ExportOptions) -> ExportOptions:
    from mst.data.sources import absolute_spec

    return replace(
        options, calibration=tuple(absolute_spec(each, None) for each in options.calibration)
    )


def _merged_before(
    job: ExportJob, environ: Mapping[str, str], lock: int, keys: KeyRing
) -> MergeReport:
    """Return the merge that all targets share, made now unless an earlier export has left it.

    Raises:
        MstError: it can't be made, or something else lies there.
    """
    directory = Path(job.merged)
    if (directory / REPORT).is_file() and checkpoint.is_whole(directory):
        report = serial.load(MergeReport, directory / REPORT)
        manifest = rundir.read_manifest(Path(job.run))
        same = (report.run, report.model_sha256, report.step) == (
            Path(job.run).name, manifest.model_sha256, job.source.step,
        )  # fmt: skip
        if same and job.options.dtype in ("auto", report.dtype):
            return report
        raise RunError(
            f"{directory} holds the merge of another run, checkpoint or dtype. Remove it, or pass"
            " another --output-dir."
        )
    made = prepare_merge(Path(job.run), directory, job.options.which, job.options.dtype, keys)
    return merge_claimed(made, environ, lock, keys)


def waiting_asleep(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of processes that compute side by side.

    OpenMP's threads wait for each other spinning, on a core that the other process needs; asleep
    they leave it, unless the user has said how they are to wait.
    """
    return {"OMP_WAIT_POLICY": "passive", **environ}


def export(
    job: ExportJob, environ: Mapping[str, str], keys: KeyRing, tell: Callable[[str], None]
) -> int:
    """Make the artefacts in the foreground; return 0, or 3 when one has failed its comparison.

    Raises:
        MstError: it could not be made, and has said why on standard error.
    """
    plan = rundir.read_document(Plan, Path(job.run), rundir.PLAN)
    environment = worker_environment(waiting_asleep(environ), plan.environment)
    with claimed(Path(job.merged).parent) as lock, handed_down(keys) as held:
        for each in job.targets:
            # Another export may have ended since this one was checked.
            refuse_existing(Path(each.directory))
        tell("merging and comparing")
        _merged_before(job, waiting_asleep(environ), lock, keys)
        handles = [] if held is None else [held]
        code = run_worker(
            "mst.export.worker",
            [serial.dumps(job), *map(str, handles)],
            environment,
            keep_open=[lock, *handles],
        )
    if code == EXIT_INTERRUPTED:
        raise Interrupted(f"{job.run} was not exported. The same command goes on.")
    if code not in (0, EXIT_REFUSED):
        cause = how_it_ended(code, "The same command goes on, with more memory free")
        raise MstError(f"{job.run} was not exported: {cause}.")
    return code
