"""A job that several commands share: what seat 0 hands over, and what the others do with it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mst import rundir
from mst import seats as sharing
from mst.durable import sha256
from mst.errors import MstError, PlanError
from mst.placement import Placement
from mst.plan import Plan
from mst.request import TrainRequest
from mst.rundir import RunManifest
from mst.seal.audit import record
from mst.seal.audit.facts import manifest_facts, plan_facts
from mst.seats import Seats
from mst.training.deepspeed_config import DEEPSPEED

_DOCUMENTS = (rundir.REQUEST, rundir.PLAN, rundir.MANIFEST, DEEPSPEED)


def placed_request(request: TrainRequest, place: Placement) -> TrainRequest:
    """Return the request with the numbers of machines and devices that the starter has chosen.

    Raises:
        PlanError: the user has asked for others.
    """
    asked, here = request.nproc_per_node, place.devices_per_node
    if asked is not None and here is not None and asked != here:
        raise PlanError(
            f"--nproc-per-node {asked} was asked for, but {place.starter} started {here} processes"
            " on each machine. Leave the option out."
        )
    return replace(request, nnodes=place.nnodes, nproc_per_node=here or asked)


def hand_over_run(path: Path, manifest: RunManifest, seats: Seats) -> None:
    """Give the other seats the documents of a run directory, and wait until they are ready.

    Raises:
        RunError: a machine has another model or other data; names it.
    """
    documents = {
        name: (path / name).read_text(encoding="utf-8")
        for name in _DOCUMENTS
        if (path / name).is_file()
    }
    files = {each.path: each.sha256 for each in (*manifest.data, *manifest.val_data)}
    request = rundir.read_document(TrainRequest, path, rundir.REQUEST)
    checks = {
        "model_signature": request.model_signature,
        "model_public_key": request.model_public_key,
        "model_path": manifest.model_path,
        "model_sha256": manifest.model_sha256,
        "files": files,
    }
    sharing.hand_over(seats, documents, checks)


def differs_here(checks: Mapping[str, Any]) -> str:
    """Return which of the model and the data is missing here, or is another one; "" for none.

    A model that was verified on machine 0 is verified here too, by files of the same paths.
    """
    from mst.model.fingerprint import model_sha256
    from mst.seal.supply.before_use import verify_before_use

    host, model = socket.gethostname(), checks["model_path"]
    if not (Path(model) / "config.json").is_file():
        return f"{host} has no model at {model}. Copy it there, to the same path"
    if model_sha256(Path(model)) != checks["model_sha256"]:
        return f"the model at {model} on {host} is not that of machine 0. Copy it there"
    try:
        verify_before_use(Path(model), checks["model_signature"], checks["model_public_key"])
    except MstError as error:
        return f"{host}: {error}"
    for path, digest in checks["files"].items():
        if not Path(path).is_file():
            return f"{host} has no {path}. Copy it there, to the same path"
        if sha256(Path(path)) != digest:
            return f"{path} on {host} is not that of machine 0. Copy it there"
    return ""


def work_along(seats: Seats, environ: Mapping[str, str], tell: Callable[[str], None]) -> int:
    """Train along with seat 0 until it says that the job is over; return the job's exit code."""
    from mst.workers import run_workers

    def one_round(directory: Path) -> int:
        tell(f"training along with machine 0, {seats.place.address}, over {seats.interface}")
        plan = rundir.read_document(Plan, directory, rundir.PLAN)
        manifest = rundir.read_manifest(directory)
        record("train.joined", **plan_facts(plan), **manifest_facts(manifest))
        code = run_workers(directory, plan, environ, seats, ())
        record("train.left", code=code)
        return code

    return sharing.serve(seats, differs_here, one_round)
