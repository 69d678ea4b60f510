"""A job's attempts: once more, with the next smaller plan, when memory ran out after all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

from mst import rundir
from mst.configuration import ZERO_STAGES, checkpointing_option
from mst.errors import EXIT_OUT_OF_MEMORY, EXIT_PEER_FAILED, MstError, RunError
from mst.job import Job, write_documents
from mst.launch import KILLED, WAS_KILLED
from mst.quantities import gib
from mst.retry import next_smaller
from mst.rundir import ForecastMiss
from mst.seal.audit import record
from mst.seal.audit.facts import job_facts, outcome_facts, run_facts
from mst.seal.keys.ring import handed_down
from mst.shared_job import hand_over_run
from mst.workers import run_workers, write_deepspeed


def run_to_end(
    path: Path,
    job: Job,
    lock: IO[str],
    environ: Mapping[str, str],
    tell: Callable[[str], None] = lambda line: None,
) -> int:
    """Run a job's worker; after its memory ran out, once more with the next smaller plan.

    Args:
        path: the run directory.
        job: as written there.
        lock: of the directory, held.
        environ: the process's environment.
        tell: shown to the user before a second attempt.

    Returns:
        The exit code of the last attempt.

    Raises:
        RunError: the worker died without a word.
    """
    before = oom_kills()
    killed: RunError | None = None
    try:
        code = _execute(path, job, lock, environ)
    except RunError as error:
        if oom_kills() == before:
            raise
        killed, code = error, EXIT_OUT_OF_MEMORY
        rundir.add_miss(path, _killed(job))
    if code != EXIT_OUT_OF_MEMORY:
        return code
    smaller = None
    if job.request.on_oom == "retry":
        smaller = next_smaller(job.plan, job.model, job.data, job.request)
    if smaller is None:
        if killed is not None:
            raise killed
        return code
    switch = checkpointing_option(smaller.gradient_checkpointing, smaller.checkpointed_layers)
    tell(
        "the plan did not fit; once more with the next smaller one: micro-batches of"
        f" {smaller.per_device_train_batch_size} rows, gradient checkpointing {switch},"
        f" {gib(smaller.memory.peak_bytes)} predicted. The global batch stays"
    )
    request = replace(job.request, resume="last")
    manifest = replace(rundir.read_manifest(path), status="running", finished=None, error=None)
    again = replace(job, plan=smaller, request=request, manifest=manifest)
    write_documents(path, again)
    return _execute(path, again, lock, environ)


def _execute(path: Path, job: Job, lock: IO[str], environ: Mapping[str, str]) -> int:
    """Run the worker in the foreground; return its exit code.

    A worker that dies without a word (killed, out of memory) is recorded as failed.
    """
    record("train.begun", **job_facts(job), **run_facts(path))
    try:
        return _run(path, job, lock, environ)
    finally:
        record("train.ended", **outcome_facts(path))


def _run(path: Path, job: Job, lock: IO[str], environ: Mapping[str, str]) -> int:
    try:
        if job.plan.nnodes > 1 and job.seats is None:
            raise RunError(
                f"the run in {path} is for {job.plan.nnodes} machines. Type `mst train --nnodes"
                f" {job.plan.nnodes} --master-addr …` on each, with its --node-rank (and --resume"
                " on machine 0), or pass --nnodes 1."
            )
        if ZERO_STAGES[job.plan.strategy]:
            write_deepspeed(path, job.plan, job.request)
        if job.seats:
            hand_over_run(path, job.manifest, job.seats)
    except MstError as error:
        rundir.update_manifest(path, status="failed", finished=rundir.now(), error=str(error))
        raise
    with handed_down(job.keys) as handle:
        code = run_workers(path, job.plan, environ, job.seats, (lock.fileno(),), handle)
    if code != 0 and rundir.read_manifest(path).status == "running":
        cause = f"the worker ended with code {code}"
        if code == EXIT_PEER_FAILED:
            cause = "another process of this job was lost"
        if code == KILLED:
            cause = WAS_KILLED
        rundir.update_manifest(path, status="failed", finished=rundir.now(), error=cause)
        if code == EXIT_OUT_OF_MEMORY:  # told on the machine where it was
            return code
        raise RunError(
            f"{cause}. What was saved is whole; go on with: mst train --output-dir {path} --resume"
        )
    return code


def _killed(job: Job) -> ForecastMiss:
    plan = job.plan
    return ForecastMiss(
        step=0,
        micro_batch=plan.per_device_train_batch_size,
        checkpointing=plan.gradient_checkpointing,
        forecast_bytes=plan.memory.peak_bytes,
        measured_bytes=None,
        available_bytes=plan.memory.available_bytes,
        cause="killed",
        when=rundir.now(),
        checkpointed_layers=plan.checkpointed_layers,
    )


def oom_kills(root: Path = Path("/")) -> int:
    """Return how many processes the kernel has ended for their memory since it was started.

    Counted are the machine's and this process's control group's; 0 where neither is told.

    Args:
        root: where /proc and /sys are; another tree in tests.
    """
    lines: list[str] = []
    for file in (root / "proc/vmstat", root / "sys/fs/cgroup/memory.events"):
        try:
            lines += file.read_text(encoding="ascii").splitlines()
        except OSError:
            continue
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
