"""What the log says of data, models, plans and results: names, places, numbers and hashes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mst import rundir
from mst.durable import sha256
from mst.errors import MstError

if TYPE_CHECKING:
    from mst.data.rows import FileFacts
    from mst.evaluate.job import EvalJob
    from mst.evaluate.report import EvalReport
    from mst.job import Job
    from mst.merge import MergeReport
    from mst.plan import Plan
    from mst.rundir import RunManifest
    from mst.seal.audit.event import JsonValue
    from mst.tuned import TunedModel

Facts = dict[str, "JsonValue"]
# A data set of very many files is named by its first ones; the run directory has all of them.
_FILES_AT_MOST = 1000


def data_facts(files: Sequence[FileFacts]) -> JsonValue:
    """Return the data files that were read, with their hashes and the names of their keys."""
    found: list[JsonValue] = []
    for each in files[:_FILES_AT_MOST]:
        facts: Facts = {"path": each.path, "sha256": each.sha256, "rows": each.rows}
        if each.key:
            facts |= {"key": each.key}
        if each.images:
            facts |= {"images": each.images, "images_sha256": each.images_sha256}
        found.append(facts)
    more = len(files) - _FILES_AT_MOST
    return [*found, {"more_files": more}] if more > 0 else found


def hashed_files(paths: Sequence[str]) -> JsonValue:
    """Return files with their hashes, of those that can be read."""
    found: list[JsonValue] = []
    for each in paths[:_FILES_AT_MOST]:
        try:
            found.append({"path": each, "sha256": sha256(Path(each))})
        except OSError:
            found.append({"path": each, "sha256": None})
    return found


def manifest_facts(manifest: RunManifest) -> Facts:
    """Return which model and which data a run is of."""
    return {
        "model": manifest.model,
        "model_path": manifest.model_path,
        "model_sha256": manifest.model_sha256,
        "data": data_facts(manifest.data),
        "val_data": data_facts(manifest.val_data),
    }


def plan_facts(plan: Plan) -> Facts:
    """Return the choices of a plan that an auditor asks for."""
    return {
        "backend": plan.backend,
        "devices": list(plan.torch_devices),
        "machines": plan.nnodes,
        "strategy": plan.strategy,
        "tuner": plan.tuner,
        "quantization": plan.quantization,
        "compute_dtype": plan.compute_dtype,
        "train_rows": plan.train_rows,
        "val_rows": plan.val_rows,
        "total_steps": plan.total_steps,
        "learning_rate": plan.learning_rate,
        "privacy": None if plan.privacy is None else asdict(plan.privacy),
    }


def job_facts(job: Job) -> Facts:
    """Return what a job trains on what, and how."""
    resumed = job.request.resume is not None
    return {
        "task": job.request.task,
        "seed": job.request.seed,
        "resumed": resumed,
        "encrypted_run": job.request.encrypt_run,
        **plan_facts(job.plan),
        **manifest_facts(job.manifest),
    }


def run_facts(path: Path) -> Facts:
    """Return a run directory, with the hashes of what was asked and planned."""
    return {
        "run": str(path),
        "request_sha256": sha256(path / rundir.REQUEST),
        "plan_sha256": sha256(path / rundir.PLAN),
    }


def outcome_facts(path: Path) -> Facts:
    """Return how a run stands, with the hashes of what it made."""
    try:
        manifest = rundir.read_manifest(path)
    except (MstError, OSError):
        return {"run": str(path), "status": "unknown"}
    return {
        "run": str(path),
        "status": manifest.status,
        "results": dict(manifest.results),
        "outputs": dict(manifest.outputs),
        "manifest_sha256": sha256(path / rundir.MANIFEST),
    }


def model_facts(model: TunedModel) -> Facts:
    """Return what is loaded, with the fingerprint of its base or whole model."""
    from mst.tuned import fingerprint_of

    return {
        "model_path": model.weights,
        "model_sha256": fingerprint_of(model),
        "adapter": model.adapter,
        "step": model.step,
    }


def export_facts(target: Path, report: MergeReport) -> Facts:
    """Return what a merge wrote, with the hash of every file, and what it was made of."""
    files = sorted(each for each in target.rglob("*") if each.is_file())
    return {
        "target": str(target),
        "run": report.run,
        "model": report.model,
        "model_sha256": report.model_sha256,
        "data_sha256": list(report.data_sha256),
        "dtype": report.dtype,
        "files": {str(each.relative_to(target)): sha256(each) for each in files},
    }


def artefact_facts(directory: Path) -> Facts:
    """Return what an export wrote, how it came out, and the hash that covers all of its files."""
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    kept = ("format", "scheme", "status", "faults", "run", "model_sha256", "data_sha256", "quality")
    return {
        "target": str(directory),
        **{name: manifest[name] for name in kept},
        "manifest_sha256": sha256(directory / "manifest.json"),
    }


def evaluation_facts(job: EvalJob) -> Facts:
    """Return which model is to be judged on which rows."""
    return {
        "name": job.subject.name,
        "model_sha256": job.subject.model_sha256,
        "adapter": job.subject.model.adapter,
        "against": None if job.other is None else job.other.name,
        "run": job.run,
        "dataset": list(job.request.dataset),
        "harness": list(job.request.harness),
        "device": job.torch_device,
        "predictions": job.request.predictions,
    }


def report_facts(report: EvalReport) -> Facts:
    """Return what an evaluation found."""
    return {
        "data": data_facts(report.data),
        "rows": report.rows,
        "figures": {each.name: each.value for each in report.figures},
    }
