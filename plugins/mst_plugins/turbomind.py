"""The export target `turbomind`: a checkpoint that LMDeploy's TurboMind loads, by its own rules.

Source of the rules: lmdeploy 0.18.0, in its folder turbomind: `converter.py` (`get_tm_config`,
`_SUPPORTED_GROUP_SIZES`), `weight_format.py` (`accepts`) and `supported_models.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import PlanError
from mst.export import ExportPlan, ExportReport, ExportRequest
from mst.hookspecs import hookimpl
from mst.model.files import read_config
from mst_plugins import quantized_target as target
from mst_plugins.quantized_model import Scheme, decoder_linears
from mst_plugins.quantized_target import ROUNDING
from mst_plugins.weights import unpacked_weights

if TYPE_CHECKING:
    import torch

    from mst.plan import Reason

LMDEPLOY = "0.18.0"
ARCHITECTURES = frozenset(
    {
        "Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "InternLM2ForCausalLM",
        "InternLM3ForCausalLM",
    }
)  # fmt: skip
# Layout to the group sizes that it is loaded with, largest first; four bits in each.
GROUP_SIZES = {"gptq": (128,), "awq": (128,), "compressed-tensors": (128, 32)}
_METHODS = ("gptq", "awq", ROUNDING)


@hookimpl
def mst_export_name() -> str:
    """Return "turbomind"."""
    return "turbomind"


@hookimpl
def mst_export_check(request: ExportRequest) -> ExportPlan:
    """Return the plan.

    Raises:
        PlanError: TurboMind loads no such architecture, bits or groups.
    """
    scheme, reasons = _scheme(request)
    made = target.plan_of(request, scheme, reasons, _METHODS, ("lmdeploy serve api_server {path}",))
    why = "lmdeploy is not installed here"
    if importlib.util.find_spec("lmdeploy") is not None:
        why = "its engine needs a CUDA device, and loading it here is not done yet"
    not_checked = {f"loaded by TurboMind (rules of lmdeploy {LMDEPLOY})": why}
    return replace(made, scheme=f"{scheme.layout}: {made.scheme}", not_checked=not_checked)


def _scheme(request: ExportRequest) -> tuple[Scheme, tuple[Reason, ...]]:
    """Return layout, bits and groups that TurboMind loads: groups of 128 where widths allow."""
    from mst.plan import Reason

    named = read_config(Path(request.model_dir)).get("architectures") or ["unknown"]
    if named[0] not in ARCHITECTURES:
        raise PlanError(
            f"--format turbomind was asked for; TurboMind of lmdeploy {LMDEPLOY} loads dense text"
            f" models of {', '.join(sorted(ARCHITECTURES))}, and this one is {named[0]}. Export it"
            " with --format merged: LMDeploy's pytorch engine loads more."
        )
    if request.bits not in (None, 4):
        raise PlanError(f"--bits {request.bits} was asked for; TurboMind loads 4. Leave it out.")
    method = target.method_of(request, _METHODS)
    own = "awq" if method == "awq" else "gptq"
    widths = sorted({each.in_features for each in decoder_linears(Path(request.model_dir))})
    odd = [width for width in widths if width % 128]
    if not odd and request.group_size in (None, 128):
        return target.scheme_of(request, own, GROUP_SIZES[own])
    if method == "awq":
        raise PlanError(
            f"--method awq was asked for; TurboMind loads AWQ in groups of 128, which do not divide"
            f" {', '.join(map(str, odd))}. Leave --method out: GPTQ's codes fit into groups of 32."
        )
    layout = "compressed-tensors"
    scheme, reasons = target.scheme_of(request, layout, GROUP_SIZES[layout])
    why = f"TurboMind loads it in groups of 32; others need 128, which divides no {odd or widths}"
    return scheme, (Reason("layout", layout, why), *reasons)


@hookimpl
def mst_export(request: ExportRequest) -> ExportReport:
    """Quantize the merged model."""
    scheme, _ = _scheme(request)
    method = target.method_of(request, _METHODS)
    report = target.write(request, "turbomind", scheme, method)
    fault = config_fault(Path(request.output_dir))
    if fault:
        raise PlanError(f"what was written is nothing that TurboMind loads: {fault}.")
    checked = {**report.checked, f"rules of lmdeploy {LMDEPLOY}": "fulfilled"}
    return ExportReport(report.format, report.files, report.versions, checked)


def config_fault(directory: Path) -> str:
    """Return which of `get_tm_config`'s demands a checkpoint's config.json breaks, or ""."""
    config = read_config(directory).get("quantization_config", {})
    method, group = config.get("quant_method"), int(config.get("group_size", 0))
    if method not in GROUP_SIZES:
        return f"quant_method is {method!r}"
    if method == "awq" and config.get("version") != "gemm":
        return f"version is {config.get('version')!r}, not gemm"
    if method == "gptq" and (config.get("desc_act", False) or not config.get("sym", True)):
        return "desc_act is true, or sym is false"
    if method == "compressed-tensors":
        found = config["config_groups"]["group_0"]
        weights = found["weights"]
        group = weights["group_size"]
        if (found.get("format"), weights["num_bits"], weights["type"]) != (
            "pack-quantized", 4, "int",
        ):  # fmt: skip
            return "group_0 is not pack-quantized with 4-bit int"
    if group not in GROUP_SIZES[method]:
        return f"group_size is {group}"
    return ""


@hookimpl
def mst_export_weights(directory: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, unpacked."""
    return unpacked_weights(Path(directory))


@hookimpl
def mst_export_rounded(request: ExportRequest) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that plain rounding to the same scheme gives."""
    scheme, _ = _scheme(request)
    return target.rounded(request, scheme)
