"""The export target `merged`: the merged model itself, as transformers and every engine load it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mst.export import Bounds, ExportPlan, ExportReport, ExportRequest
from mst.export.loaded import loaded_weights
from mst.hookspecs import hookimpl
from mst.model.facts import read_facts
from mst.plan import Reason
from mst.quantities import FLOAT_BYTES

if TYPE_CHECKING:
    import torch

# Of the merge alone: what an artefact has in their place is written by mst.
_LEFT_OUT = frozenset({"manifest.json", "merge.json", "check.json", "README.md", "sbom.cdx.json"})
# Cast to bfloat16, 96 % of SmolLM2-135M's likeliest tokens stayed (merge_worker.py).
_BOUNDS = Bounds(perplexity_ratio=1.02, mean_kl=0.02, agreement=0.90, exact=True)


@hookimpl
def mst_export_name() -> str:
    """Return "merged"."""
    return "merged"


@hookimpl
def mst_export_check(request: ExportRequest) -> ExportPlan:
    """Return the plan; what is asked of quantized formats beside it is said to be of no use."""
    asked = {"bits": request.bits, "group size": request.group_size}
    unused = tuple(
        Reason(name, str(value), "not used: weights stay whole")
        for name, value in asked.items()
        if value is not None
    )
    facts = read_facts(Path(request.model_dir))
    return ExportPlan(
        scheme="merged in float32, then cast",
        bounds=_BOUNDS,
        disk_bytes=FLOAT_BYTES[request.dtype] * facts.parameters,
        memory_bytes=4 * facts.parameters,
        reasons=unused,
        serve=(
            "mst serve {path}",
            "mst chat {path}",
            "vllm serve {path}",
            "lmdeploy serve api_server {path}",
        ),
        shares_merge=True,
    )


@hookimpl
def mst_export(request: ExportRequest) -> ExportReport:
    """Give the merged model's files a second name here, or copy them to another disk."""
    directory = Path(request.output_dir)
    for each in Path(request.model_dir).iterdir():
        if each.name in _LEFT_OUT or not each.is_file():
            continue
        try:
            os.link(each, directory / each.name)
        except OSError:
            shutil.copyfile(each, directory / each.name)
    return ExportReport("merged", tuple(sorted(each.name for each in directory.iterdir())))


@hookimpl
def mst_export_weights(directory: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights as transformers loads them: whatever the files call them."""
    return loaded_weights(Path(directory))
