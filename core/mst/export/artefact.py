"""What lies beside an artefact's weights: manifest, README and bill of materials; never a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mst
from mst import rundir, serial
from mst.durable import file_listing
from mst.export import ExportReport
from mst.export.figures import Distance
from mst.export.gate import Quality
from mst.export.job import FAILED, PASSED, ExportJob, TargetJob
from mst.merge import MergeReport
from mst.model.card import model_card
from mst.plan import Plan
from mst.request import TrainRequest
from mst.seal.supply.bill import write_bill
from mst.training.checkpoint import MANIFEST

# Lies in the merge that all formats share, once it has been compared.
CHECK = "check.json"


@dataclass(frozen=True)
class MergeCheck:
    """How the merge agrees with base and adapter, all in float32, on prompts of the run.

    Attributes:
        prompts: how many.
        same_answers: of them, those with the same greedy answer.
        max_logit_difference: after a prompt.
        faults: what is too far.
    """

    prompts: int
    same_answers: int
    max_logit_difference: float
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Artefact:
    """An export, and what is known of it.

    Attributes:
        target: what was to be done.
        report: what the target says.
        quality: what was measured; None where the weights are no model of this shape.
        faults: why it has failed; empty when it has passed.
        judged_from: which rows it was measured on.
        calibration_rows: by which it was calibrated; 0 for none.
        merge: of the run.
        check: of the merge.
    """

    target: TargetJob
    report: ExportReport
    quality: Quality | None
    faults: tuple[str, ...]
    judged_from: str
    calibration_rows: int
    merge: MergeReport
    check: MergeCheck


def describe(directory: Path, job: ExportJob, artefact: Artefact) -> None:
    """Write README.md, the bill of materials and, last, manifest.json with the files' hashes."""
    run = Path(job.run)
    manifest = rundir.read_manifest(run)
    request = rundir.read_document(TrainRequest, run, rundir.REQUEST)
    plan = rundir.read_document(Plan, run, rundir.PLAN)
    card = model_card(artefact.merge, manifest, request, plan)
    text = f"{card}\n{_section(artefact)}"
    (directory / "README.md").write_text(text, encoding="utf-8")
    adapter = None if job.source.adapter is None else Path(job.source.adapter)
    base = None if adapter is None else Path(job.source.weights)
    name = f"{Path(manifest.model).name}, tuned with MST, {artefact.target.name}"
    write_bill(directory, name, job.source.step, base, adapter, manifest, request, plan)
    document = {**_manifest(run, manifest, artefact), "files": file_listing(directory)}
    (directory / MANIFEST).write_text(
        json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _manifest(run: Path, manifest: rundir.RunManifest, artefact: Artefact) -> dict[str, Any]:
    target = artefact.target
    return {
        "status": FAILED if artefact.faults else PASSED,
        "faults": list(artefact.faults),
        "format": target.name,
        "scheme": target.plan.scheme,
        "mst_version": mst.__version__,
        "created": rundir.now(),
        "run": run.name,
        "step": artefact.merge.step,
        "model": manifest.model,
        "model_sha256": manifest.model_sha256,
        "data_sha256": [each.sha256 for each in manifest.data],
        "versions": {**manifest.versions, **artefact.report.versions},
        "judged_from": artefact.judged_from,
        "calibration_rows": artefact.calibration_rows,
        "quality": None if artefact.quality is None else serial.to_json(artefact.quality),
        "bounds": serial.to_json(target.plan.bounds),
        "merge": serial.to_json(artefact.check),
        "checked": dict(artefact.report.checked),
        "not_checked": dict(target.plan.not_checked),
        "serve": list(target.plan.serve),
    }


def _section(artefact: Artefact) -> str:
    target, plan = artefact.target, artefact.target.plan
    lines = [f"## Export: {target.name}", "", f"{plan.scheme}."]
    if artefact.faults:
        lines += ["", "**This artefact has failed its comparison. Do not serve it.**", ""]
        lines += [f"- {each}" for each in artefact.faults]
    if artefact.quality is not None:
        lines += ["", f"Beside what was trained, in float32, on rows {artefact.judged_from}:", ""]
        lines += _table(artefact.quality)
    if artefact.calibration_rows:
        lines += ["", f"Calibrated on {artefact.calibration_rows} rows of the run's own kind."]
    if plan.not_checked:
        lines += ["", *(f"- not checked: {what} ({why})" for what, why in plan.not_checked.items())]
    if plan.serve:
        commands = [each.replace("{path}", ".") for each in plan.serve]
        lines += ["", "To serve it, in this directory:", "", "```console", *commands, "```"]
    return "\n".join(lines) + "\n"


def _table(quality: Quality) -> list[str]:
    columns: list[tuple[str, Distance]] = [("this model", quality.model)]
    if quality.rounding is not None:
        columns.append(("plain rounding", quality.rounding))
    rows: list[tuple[str, Callable[[Distance], str]]] = [
        ("tokens", lambda each: f"{each.tokens}"),
        ("perplexity", lambda each: f"{each.perplexity:.4g}"),
        ("perplexity, times the trained model's", lambda each: f"{each.perplexity_ratio:.4f}"),
        ("the same on answers alone", lambda each: f"{each.trained_ratio:.4f}"),
        ("mean divergence of the next token, nats", lambda each: f"{each.mean_kl:.4g}"),
        ("the same on answers alone", lambda each: f"{each.trained_kl:.4g}"),
        ("same likeliest token", lambda each: f"{each.agreement:.2%}"),
    ]
    lines = [f"| | {' | '.join(name for name, _ in columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [
        f"| {name} | {' | '.join(show(each) for _, each in columns)} |" for name, show in rows
    ]
    if quality.answers is not None:
        found = quality.answers
        known = f"{found.right:.1%} of {found.asked} (trained model: {found.trained_right:.1%})"
        lines.append(f"| right answers | {known} |{' |' * (len(columns) - 1)}")
    return lines
