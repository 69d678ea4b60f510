"""What the page shows of one run: what it is, its plan and why, its evaluation and its exports."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mst import rundir, serial
from mst.errors import MstError
from mst.evaluate.report import EvalReport
from mst.plan import Plan
from mst.rundir import RunManifest
from mst.ui.index import Entry, finite, finite_results

# Reports and artefacts that are shown, and how large a file of them may be.
_MOST_FILES = 20
_MOST_BYTES = 4 << 20
_OWN_FILES = frozenset({rundir.MANIFEST, rundir.REQUEST, rundir.PLAN, rundir.FACTS, rundir.SEAL})
_MEMORY = (
    "runtime", "weights", "trainable", "gradients", "optimizer", "activations", "logits",
    "buffers", "slack",
)  # fmt: skip


def row(entry: Entry) -> dict[str, Any]:
    """Return a run as the list has it."""
    found = entry.summary
    return {
        "id": entry.id,
        "place": entry.place,
        "name": found.name,
        "state": found.state,
        "problem": found.problem,
        "model": found.model,
        "created": found.created,
        "finished": entry.finished,
        "steps": found.steps,
        "loss": found.loss,
        "eval_loss": found.eval_loss,
        "accuracy": found.accuracy,
        "tokens_per_second": found.tokens_per_second,
    }


def detail(entry: Entry) -> dict[str, Any]:
    """Return all of a run but its curves; never raises for what lies in its directory.

    A part that is missing or damaged is None, and says why under "problems".
    """
    path, problems = entry.path, []
    found: dict[str, Any] = {**row(entry), "path": str(path)}
    try:
        manifest = rundir.read_manifest(path)
        results = finite_results(manifest)
        found |= _manifest(manifest) | {"results": results, "evaluation": _evaluation(results)}
    except (MstError, OSError) as error:
        problems.append(str(error))
    try:
        found["plan"] = _plan(rundir.read_document(Plan, path, rundir.PLAN))
    except (MstError, OSError) as error:
        problems.append(str(error))
    found["reports"] = list(_reports(path))
    found["exports"] = list(_exports(path))
    found["seal"] = _seal(path)
    found["argument"] = shlex.quote(str(path))
    found["shown_by"] = f"mst runs show {found['argument']}"
    return found | {"problems": problems}


def _manifest(manifest: RunManifest) -> dict[str, Any]:
    return {
        "mst_version": manifest.mst_version,
        "versions": dict(manifest.versions),
        "model_sha256": manifest.model_sha256,
        "data": [
            {"path": each.path, "rows": each.rows, "sha256": each.sha256}
            for each in (*manifest.data, *manifest.val_data)
        ],
        "misses": [
            {"step": each.step, "cause": each.cause, "when": each.when} for each in manifest.misses
        ],
        "privacy": None if manifest.privacy is None else serial.to_json(manifest.privacy),
    }


def _evaluation(results: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Return what the run itself has measured before and after training."""
    found = []
    for kind in ("restricted", "free"):
        after = results.get(f"accuracy_after_{kind}")
        if after is not None:
            before = results.get(f"accuracy_before_{kind}")
            found.append({"name": f"accuracy_{kind}", "before": before, "after": after})
    if "accuracy_baseline" in results:
        baseline = results["accuracy_baseline"]
        found.append({"name": "accuracy_baseline", "before": None, "after": baseline})
    for name in ("best_eval_loss", "last_eval_loss"):
        if name in results:
            found.append({"name": name, "before": None, "after": results[name]})
    return found


def _plan(plan: Plan) -> dict[str, Any]:
    memory, time = plan.memory, plan.time
    return {
        "backend": plan.backend,
        "devices": list(plan.torch_devices),
        "strategy": plan.strategy,
        "tuner": plan.tuner,
        "quantization": plan.quantization,
        "compute_dtype": plan.compute_dtype,
        "max_length": plan.max_length,
        "global_batch": plan.global_batch,
        "learning_rate": plan.learning_rate,
        "train_rows": plan.train_rows,
        "val_rows": plan.val_rows,
        "total_steps": plan.total_steps,
        "reasons": [serial.to_json(each) for each in plan.reasons],
        "warnings": list(plan.warnings),
        "memory": {name: getattr(memory, f"{name}_bytes") for name in _MEMORY},
        "peak_bytes": memory.peak_bytes,
        "available_bytes": memory.available_bytes,
        "seconds": None if time is None else time.total_seconds,
        "uncertainty": None if time is None else time.uncertainty,
        "basis": None if time is None else time.basis,
    }


def _json_file(path: Path) -> Any:
    """Return what a JSON file holds; None for none, one too large, damaged or behind a link."""
    try:
        if path.is_symlink() or path.stat().st_size > _MOST_BYTES:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _reports(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the reports of `mst eval --output` that lie in the run's directory."""
    files = sorted(each for each in path.glob("*.json") if each.name not in _OWN_FILES)
    for file in files[:_MOST_FILES]:
        try:
            report = serial.from_json(EvalReport, _json_file(file))
        except (ValueError, TypeError, AttributeError):
            continue
        compared = report.compared_with
        yield {
            "file": file.name,
            "created": report.created,
            "rows_of": report.rows_of,
            "rows": report.rows,
            "judged": report.model.name,
            "compared_with": None if compared is None else compared.name,
            "figures": [
                {
                    "name": each.name,
                    "value": finite(each.value),
                    "before": finite(each.before),
                    "interval": None if each.interval is None else list(map(finite, each.interval)),
                    "higher_is_better": each.higher_is_better,
                }
                for each in report.figures
            ],
            "notes": list(report.notes),
        }


def _exports(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the artefacts of `mst export`, each with the figures that its gate has judged."""
    for file in sorted(path.glob("export/*/manifest.json"))[:_MOST_FILES]:
        found = _json_file(file)
        if file.parent.is_symlink() or not isinstance(found, dict) or "format" not in found:
            continue
        quality = found.get("quality")
        yield {
            "format": str(found["format"]),
            "status": str(found.get("status")),
            "scheme": str(found.get("scheme")),
            "created": str(found.get("created")),
            "faults": [str(each) for each in found.get("faults") or ()],
            "judged_from": str(found.get("judged_from")),
            "model": _numbers(quality, "model"),
            "rounding": _numbers(quality, "rounding"),
            "answers": _numbers(quality, "answers"),
            "bounds": _numbers(found, "bounds"),
            "not_checked": _texts(found.get("not_checked")),
        }


def _numbers(found: Any, name: str) -> dict[str, float | None] | None:
    inner = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(inner, Mapping):
        return None
    return {str(key): finite(value) for key, value in inner.items() if not isinstance(value, str)}


def _texts(found: Any) -> dict[str, str]:
    if not isinstance(found, Mapping):
        return {}
    return {str(key): str(value) for key, value in found.items()}


def _seal(path: Path) -> dict[str, Any] | None:
    found = _json_file(path / rundir.SEAL)
    if not isinstance(found, dict) or not isinstance(found.get("layer"), str):
        return None
    ways = found.get("ways")
    ways = [each for each in ways if isinstance(each, dict)] if isinstance(ways, list) else []
    return {
        "layer": found["layer"],
        "reason": found.get("reason"),
        "ways": len(ways),
        "open": [str(each.get("name")) for each in ways if each.get("open") is True],
    }
