"""The bill of materials beside an exported model: what it was made from, as CycloneDX 1.6 (ML-BOM).

Source: https://cyclonedx.org/docs/1.6/json/. Written by hand, because cyclonedx-python-lib 11 knows
no model cards; tests hold it against that library's strict schema.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mst
from mst.durable import sha256
from mst.seal.supply.packages import package_components

if TYPE_CHECKING:
    from mst.plan import Plan
    from mst.request import TrainRequest
    from mst.rundir import RunManifest

BILL = "sbom.cdx.json"
# What shaped the weights; the run directory's request.json and plan.json hold the rest.
_OF_REQUEST = (
    "task", "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "packing",
    "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "train_on", "seed",
)  # fmt: skip
_OF_PLAN = (
    "tuner", "quantization", "learning_rate", "optim", "compute_dtype", "weights_dtype",
    "per_device_train_batch_size", "gradient_accumulation_steps", "global_batch", "total_steps",
    "max_length", "strategy", "world_size",
)  # fmt: skip
_WEIGHTS = ("*.safetensors",)


def write_bill(
    directory: Path,
    name: str,
    step: int | None,
    base: Path | None,
    adapter: Path | None,
    manifest: RunManifest,
    request: TrainRequest,
    plan: Plan,
) -> None:
    """Write the bill of materials of an exported model into its directory, once all else is there.

    Data sets stand in it by their hashes alone: a bill is passed on, and a file's name can say
    whose records it holds.

    Args:
        directory: of the export; every file in it is hashed.
        name: of the model.
        step: optimizer steps it was trained for.
        base: directory of the model that it was tuned from, whose weights are hashed; None when
            it isn't read for the export.
        adapter: directory of the adapter that went into it; None for a whole model.
        manifest: the run's.
        request: the run's.
        plan: the run's.
    """
    base_part = _base(base, manifest)
    data = _data(manifest)
    adapter_part = [] if adapter is None else [_adapter(adapter, step)]
    packages = package_components()
    tool = {
        "type": "application", "bom-ref": "mst", "name": "mst-train",
        "version": mst.__version__, "licenses": [{"license": {"id": "Apache-2.0"}}],
    }  # fmt: skip
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": f"step-{step}",
        "pedigree": {"ancestors": [base_part]},
        "modelCard": _card(manifest, request, plan, [str(each["bom-ref"]) for each in data]),
        "components": _files(directory),
    }
    made_from = ["adapter"] * len(adapter_part) + [str(each["bom-ref"]) for each in data]
    text = document(
        tool,
        model,
        [*adapter_part, *data, *packages],
        [
            {"ref": "model", "dependsOn": made_from},
            {"ref": "mst", "dependsOn": [each["bom-ref"] for each in packages]},
        ],
    )
    (directory / BILL).write_text(text, encoding="utf-8")


def document(
    tool: Mapping[str, Any],
    component: Mapping[str, Any],
    components: Sequence[Mapping[str, Any]],
    dependencies: Sequence[Mapping[str, Any]],
) -> str:
    """Return a bill of materials as JSON, made now.

    Args:
        tool: that made it.
        component: that it is of.
        components: what that was made from or holds.
        dependencies: between their `bom-ref`s.
    """
    from mst.rundir import now

    bill = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": now(),
            "tools": {"components": [tool]},
            "component": component,
        },
        "components": components,
        "dependencies": dependencies,
    }
    return json.dumps(bill, indent=2, ensure_ascii=False) + "\n"


def _hash(value: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": value}]


def _properties(values: Mapping[str, object], prefix: str) -> list[dict[str, str]]:
    return [
        {"name": f"mst:{prefix}:{name}", "value": _text(value)}
        for name, value in values.items()
        if value is not None
    ]


def _text(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _files(directory: Path, only: Iterable[str] = ("*",)) -> list[dict[str, Any]]:
    """Return a component for each file under a directory, named by its path there."""
    paths = sorted({path for pattern in only for path in directory.rglob(pattern)})
    return [
        {
            "type": "file",
            "name": path.relative_to(directory).as_posix(),
            "hashes": _hash(sha256(path)),
        }
        for path in paths
        if path.is_file() and path.name != BILL
    ]


def _base(base: Path | None, manifest: RunManifest) -> dict[str, Any]:
    known: dict[str, object] = {"fingerprint": manifest.model_sha256}
    if manifest.model_signature is not None:
        known |= asdict(manifest.model_signature)
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "base",
        "name": manifest.model,
        "properties": _properties(known, "base"),
    }
    if base is None:
        return component
    licence = _licence(base)
    if licence:
        component["licenses"] = [{"license": {"name": licence}}]
    return component | {"components": _files(base, ("config.json", "tokenizer.json", *_WEIGHTS))}


def _licence(base: Path) -> str | None:
    """Return the licence that a model's card names, as hubs write it; None when there is none."""
    card = base / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        found = re.search(
            r"\A---\n.*?^license:[ \t]*([\w.+-]{1,60})\s*$", file.read(4096), re.M | re.S
        )
    return found[1] if found else None


def _adapter(adapter: Path, step: int | None) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": "adapter",
        "name": "LoRA adapter",
        "version": f"step-{step}",
        # Of an encrypted run, as they lie there.
        "components": _files(adapter, ("adapter_config.json", "adapter_model.safetensors*")),
    }


def _data(manifest: RunManifest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for use, files in (("training", manifest.data), ("held-out", manifest.val_data)):
        for each in files:
            number = len(found) + 1
            found.append(
                {
                    "type": "data",
                    "bom-ref": f"data-{number}",
                    "name": f"data set {number}",
                    "hashes": _hash(each.sha256),
                    "data": [{"type": "dataset", "name": f"data set {number}"}],
                    "properties": _properties(
                        {
                            "use": use,
                            "rows": each.rows,
                            "images_sha256": each.images_sha256 or None,
                        },
                        "data",
                    ),
                }
            )
    return found


def _card(
    manifest: RunManifest, request: TrainRequest, plan: Plan, data: Sequence[str]
) -> dict[str, Any]:
    values = {name: getattr(request, name) for name in _OF_REQUEST}
    values |= {name: getattr(plan, name) for name in _OF_PLAN}
    values["mst_version"] = manifest.mst_version
    rewarded = request.task == "grpo"
    return {
        "modelParameters": {
            "approach": {"type": "reinforcement-learning" if rewarded else "supervised"},
            "task": "text-generation",
            "datasets": [{"ref": each} for each in data],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                {"type": name, "value": _text(value)} for name, value in manifest.results.items()
            ]
        },
        "properties": _properties(values, "training"),
    }
