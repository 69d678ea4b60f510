"""The export target `awq`: AWQ's own method and GEMM layout, by gptqmodel."""

from __future__ import annotations

from mst_plugins.layout_target import LayoutTarget
from mst_plugins.quantized_target import ROUNDING

_TARGET = LayoutTarget(
    "awq",
    methods=("awq", ROUNDING),
    serve=("vllm serve {path}", "lmdeploy serve api_server {path}"),
)
mst_export_name = _TARGET.mst_export_name
mst_export_check = _TARGET.mst_export_check
mst_export = _TARGET.mst_export
mst_export_weights = _TARGET.mst_export_weights
mst_export_rounded = _TARGET.mst_export_rounded
