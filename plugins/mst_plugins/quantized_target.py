"""What the quantized export targets share: scheme, plan, writing and reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import PlanError
from mst.export import Bounds, ExportPlan, ExportReport, ExportRequest
from mst.model.facts import ModelFacts, read_facts
from mst.plan import Reason
from mst.quantities import FLOAT_BYTES
from mst_plugins import gptqmodel_job
from mst_plugins.layouts.groups import GROUP_SIZES, choose_group_size
from mst_plugins.layouts.layout import LAYOUTS
from mst_plugins.quantized_model import Scheme, decoder_linears, faults
from mst_plugins.repacking import repack
from mst_plugins.rtn import round_model
from mst_plugins.weights import rounded_weights

if TYPE_CHECKING:
    import torch

ROUNDING = "rtn"
# Of SmolLM2-135M, small enough that every rounding shows: measured values and about half as much
# again (benchmarks/export_quality.py).
_BOUNDS = {
    4: Bounds(perplexity_ratio=1.25, mean_kl=0.20, agreement=0.80, weight_error=0.3),
    8: Bounds(perplexity_ratio=1.03, mean_kl=0.03, agreement=0.90, weight_error=0.03),
}


def scheme_of(
    request: ExportRequest, layout: str, sizes: Sequence[int] = GROUP_SIZES
) -> tuple[Scheme, tuple[Reason, ...]]:
    """Return how weights become codes, and why where it was left open.

    Args:
        request: bits and group size, if they were given.
        layout: one of `LAYOUTS`.
        sizes: group sizes that the layout's readers take, largest first.

    Raises:
        PlanError: the layout has no such bits, or the group size does not divide the widths.
        ModelError: the model's layers can't be quantized.
    """
    able = LAYOUTS[layout]
    bits = request.bits or able.BITS[0]
    if bits not in able.BITS:
        known = " or ".join(map(str, able.BITS))
        raise PlanError(f"--bits {bits} was asked for; {layout} has {known}. Pass one of these.")
    linears = decoder_linears(Path(request.model_dir))
    if request.group_size is not None and request.group_size not in sizes:
        known = ", ".join(map(str, sizes))
        raise PlanError(
            f"--group-size {request.group_size} was asked for; {layout} is read with {known}. Pass"
            " one of these, or auto."
        )
    asked = sizes if request.group_size is None else (request.group_size,)
    chosen = choose_group_size(linears, asked)
    reasons: tuple[Reason, ...] = ()
    if request.group_size is None:
        against = [
            f"{size} does not divide {', '.join(map(str, widths))}"
            for size, widths in chosen.forbidden.items()
        ]
        why = "; ".join(against) or "the largest that its readers take divides every width"
        reasons = (Reason("group size", str(chosen.group_size), why),)
    return Scheme(layout, bits, chosen.group_size, able.SYMMETRIC[0]), reasons


def plan_of(
    request: ExportRequest,
    scheme: Scheme,
    reasons: tuple[Reason, ...],
    methods: Sequence[str],
    serve: Sequence[str],
) -> ExportPlan:
    """Return the plan of a quantized target.

    Args:
        request: names the method.
        scheme: from `scheme_of`.
        reasons: of the scheme.
        methods: that the target has, its best first.
        serve: commands.

    Raises:
        PlanError: there is no such method, or its library is missing.
    """
    method = method_of(request, methods)
    linears = decoder_linears(Path(request.model_dir))
    if method != ROUNDING:
        gptqmodel_job.check(linears, replace(scheme, layout=method))
    facts = read_facts(Path(request.model_dir))
    bounds = replace(_BOUNDS[scheme.bits], beats_rounding=method != ROUNDING)
    if method == "awq":
        bounds = replace(bounds, weight_error=None)
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    words = {ROUNDING: "rounded to nearest"}.get(method, method.upper())
    written = _stored_bytes(facts, scheme, request.dtype)
    return ExportPlan(
        scheme=f"{scheme.bits} bits, groups of {scheme.group_size}, {kind}, {words}",
        bounds=bounds,
        disk_bytes=written,
        # gptqmodel holds the model, and a layer's inputs over the calibration rows.
        memory_bytes=(4 if method == ROUNDING else 8) * facts.parameters,
        calibrated=method != ROUNDING,
        reasons=reasons,
        serve=tuple(serve),
        work_bytes=0 if method == ROUNDING else _work_bytes(facts, request.dtype, written),
    )


def method_of(request: ExportRequest, methods: Sequence[str]) -> str:
    """Return how codes are found.

    Raises:
        PlanError: the target has no such method.
    """
    if request.method == "auto":
        return methods[0]
    if request.method not in methods:
        raise PlanError(
            f"--method {request.method} was asked for; this format has {', '.join(methods)}. Pass"
            " one of these, or auto."
        )
    return request.method


def _work_bytes(facts: ModelFacts, dtype: str, written: int) -> int:
    """Return what gptqmodel writes beside the artefact at the most.

    That is layers to go on from and those that wait on the disk, and the result twice, where it
    fits another layout: 0.30 GB and 0.42 GB of SmolLM2-135M, for which this says 0.51.
    """
    return FLOAT_BYTES[dtype] * facts.parameters + 2 * written


def _stored_bytes(facts: ModelFacts, scheme: Scheme, dtype: str) -> int:
    packed = sum(each.out_features * each.in_features for each in facts.linears)
    groups = packed // scheme.group_size
    whole = FLOAT_BYTES[dtype] * max(0, facts.parameters - packed)
    # Float16 scales and packed zero points.
    return packed * scheme.bits // 8 + 3 * groups + whole


def write(request: ExportRequest, name: str, scheme: Scheme, method: str) -> ExportReport:
    """Fill the output directory.

    Raises:
        MstError: it can't be quantized.
    """
    source, directory = Path(request.model_dir), Path(request.output_dir)
    linears = decoder_linears(source)
    if method == ROUNDING:
        round_model(source, directory, linears, scheme)
        versions = {}
    else:
        # gptqmodel writes its methods' own layouts; the same codes fit into others.
        own = scheme.layout == method
        made = directory if own else Path(request.work_dir) / method
        made.mkdir(exist_ok=True)
        gptqmodel_job.quantize(
            source,
            made,
            Path(request.work_dir) / "layers",
            replace(scheme, layout=method),
            request.calibration,
            request.threads,
            request.environ,
            lambda done: request.tell(f"layer {done.layer} of {done.layers}"),
        )
        if not own:
            repack(made, source, directory, method, scheme)
        versions = {"gptqmodel": gptqmodel_job.VERSION}
    if found := faults(directory, linears, scheme):
        raise PlanError(f"what was written is no {scheme.layout} checkpoint: {found[0]}.")
    files = tuple(sorted(each.name for each in directory.iterdir()))
    return ExportReport(name, files, versions, {"shapes and dtypes": "as the layout has them"})


def rounded(request: ExportRequest, scheme: Scheme) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that plain rounding to the scheme would give."""
    source = Path(request.model_dir)
    return rounded_weights(source, decoder_linears(source), scheme)
