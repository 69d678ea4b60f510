"""One run of a cell in a peer: planned as mst's own, it leaves a directory as `mst train` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mst import rundir, serial
from mst.bench.cells import Cell, request_values
from mst.bench.peers import check_plan, installed, visible
from mst.bench.predict import train_request
from mst.errors import OutOfMemory, RunError, UsageError

RESULT = "peer.json"


def read_cell(path: Path) -> Cell:
    """Return the cell in a file.

    Raises:
        UsageError: there is none.
    """
    try:
        return serial.load(Cell, path)
    except OSError as error:
        raise UsageError(f"cannot read the cell {path}: {error.strerror}.") from None
    except ValueError:
        raise UsageError(f"{path} holds no cell of `mst bench`.") from None


def run_peer(cell: Cell, python: str, run: Path, environ: Mapping[str, str]) -> int:
    """Train a cell in its peer and return the exit code.

    Args:
        cell: to train.
        python: the interpreter of the peer's environment.
        run: takes request, plan, metrics and figures; no weights that are kept.
        environ: the process's environment.

    Raises:
        PeerAbsent: the peer isn't there.
        PeerRefused: it can't do what mst does in this cell.
        OutOfMemory: the kernel killed it.
        MstError: the cell can't be planned here.
    """
    from mst.inputs import with_defaults
    from mst.job import begin, prepare_job
    from mst.launch import KILLED, how_it_ended, run_worker, worker_environment

    versions = dict(installed(cell.peer, python))
    request = train_request(cell)
    given = frozenset(request_values(cell))
    request = replace(with_defaults(request, given), output_dir=str(run))
    job = prepare_job(request, environ)
    check_plan(cell.peer, job.plan, job.request)
    path, lock = begin(job)
    with lock:
        variables = worker_environment(environ, visible(job.plan))
        code = run_worker(
            "mst.bench.peer_worker", [str(path), cell.peer, python], variables, (lock.fileno(),)
        )
        if code == 0:
            _finish(path, versions, job.plan.total_steps)
            return code
        rundir.update_manifest(path, status="failed", finished=rundir.now())
    if code == KILLED:
        raise OutOfMemory(
            f"{how_it_ended(code, 'Give the peer fewer rows at once, or shorter ones')}."
        )
    return code


def _finish(path: Path, versions: dict[str, str], steps: int) -> None:
    """Record what the peer has left as `mst train` records its own.

    Raises:
        RunError: it has left nothing, or not every step.
    """
    done = len(rundir.read_metrics(path))
    try:
        found: dict[str, Any] = json.loads((path / RESULT).read_text(encoding="utf-8"))
        results = dict(rundir.read_manifest(path).results)
        results["peak_memory_bytes"] = float(found["peak_memory_bytes"])
        if found["eval_loss"] is not None:
            results["last_eval_loss"] = float(found["eval_loss"])
    except (OSError, ValueError, LookupError, TypeError):
        raise RunError("the peer ended without a word of what it did.") from None
    if done != steps:
        raise RunError(f"the peer told of {done} steps; {steps} were asked for.")
    rundir.update_manifest(
        path, status="done", finished=rundir.now(), results=results, versions=versions
    )
