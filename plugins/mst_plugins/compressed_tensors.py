"""The export target `compressed-tensors`: GPTQ's codes in its pack-quantized layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mst.export import ExportPlan, ExportReport, ExportRequest
from mst.hookspecs import hookimpl
from mst_plugins import quantized_target as target
from mst_plugins.quantized_target import ROUNDING
from mst_plugins.weights import unpacked_weights

if TYPE_CHECKING:
    import torch

_NAME = "compressed-tensors"
_METHODS = ("gptq", ROUNDING)
_SERVE = ("vllm serve {path}",)


@hookimpl
def mst_export_name() -> str:
    """Return "compressed-tensors"."""
    return _NAME


@hookimpl
def mst_export_check(request: ExportRequest) -> ExportPlan:
    """Return the plan; raises as `mst_plugins.quantized_target` says."""
    scheme, reasons = target.scheme_of(request, _NAME)
    return target.plan_of(request, scheme, reasons, _METHODS, _SERVE)


@hookimpl
def mst_export(request: ExportRequest) -> ExportReport:
    """Quantize the merged model."""
    scheme, _ = target.scheme_of(request, _NAME)
    return target.write(request, _NAME, scheme, target.method_of(request, _METHODS))


@hookimpl
def mst_export_weights(directory: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, unpacked."""
    return unpacked_weights(Path(directory))


@hookimpl
def mst_export_rounded(request: ExportRequest) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that plain rounding to the same scheme gives."""
    scheme, _ = target.scheme_of(request, _NAME)
    return target.rounded(request, scheme)
