"""An export target that is one layout: what `gptq`, `awq` and `compressed-tensors` share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mst.export import ExportPlan, ExportReport, ExportRequest
from mst.hookspecs import hookimpl
from mst_plugins import quantized_target as target
from mst_plugins.weights import unpacked_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayoutTarget:
    """The hooks of such a target; a plugin's module gives them their names.

    Attributes:
        layout: one of `LAYOUTS`, by whose name the target is called.
        methods: that find its codes, the best first.
        serve: commands.
    """

    layout: str
    methods: tuple[str, ...]
    serve: tuple[str, ...]

    @hookimpl
    def mst_export_name(self) -> str:
        """Return the layout's name."""
        return self.layout

    @hookimpl
    def mst_export_check(self, request: ExportRequest) -> ExportPlan:
        """Return the plan; raises as `mst_plugins.quantized_target` says."""
        scheme, reasons = target.scheme_of(request, self.layout)
        return target.plan_of(request, scheme, reasons, self.methods, self.serve)

    @hookimpl
    def mst_export(self, request: ExportRequest) -> ExportReport:
        """Quantize the merged model."""
        scheme, _ = target.scheme_of(request, self.layout)
        method = target.method_of(request, self.methods)
        return target.write(request, self.layout, scheme, method)

    @hookimpl
    def mst_export_weights(self, directory: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights, unpacked."""
        return unpacked_weights(Path(directory))

    @hookimpl
    def mst_export_rounded(self, request: ExportRequest) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights that plain rounding to the same scheme gives."""
        scheme, _ = target.scheme_of(request, self.layout)
        return target.rounded(request, scheme)
