"""The operator checklist of LoRA training: each case on the device, against the CPU's values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mst.conformance.activation import torch_device
from mst.conformance.findings import Context, Finding, verdict
from mst.conformance.processes import first_line

if TYPE_CHECKING:
    import torch

# Of the largest value of the CPU's answer, in float32. Rounding in another order stays near 1e-6;
# TF32, which must be asked for, would be 5e-4.
TOLERANCE = 5e-5


@dataclass(frozen=True)
class Case:
    """One operator.

    Attributes:
        name: as torch's dispatcher calls it, which is what a vendor implements.
        compute: from the inputs to a tensor or several.
        inputs: made on the CPU from a seeded generator.
        differentiable: gradients of the float inputs are compared too.
    """

    name: str
    compute: Callable[..., Any]
    inputs: Callable[[torch.Generator], Sequence[torch.Tensor]]
    differentiable: bool = True


def check_group(context: Context, cases: Sequence[Case]) -> Finding:
    """Run the cases and name every operator that differs from the CPU."""
    device = torch_device(context.subject)
    faults, errors = [], {}
    for case in cases:
        context.at(case.name)
        fault, error = fault_of(case, device)
        if fault:
            faults.append(f"{case.name}: {fault}")
        if math.isfinite(error):
            errors[case.name] = error
    worst = max(errors, key=lambda name: errors[name], default="")
    return verdict(
        faults,
        "implement the named operators for the device, or fall back to the CPU for them",
        f"{len(cases)} operators agree with the CPU"
        + (f", worst {worst} by {errors[worst]:.1e}" if worst else ""),
        relative_error=errors,
    )


def fault_of(case: Case, device: torch.device) -> tuple[str, float]:
    """Return how a case goes wrong on the device, or "", and its worst relative error."""
    import torch

    wanted = _answers(case, torch.device("cpu"))
    try:
        got = _answers(case, device)
    except NotImplementedError as missing:
        return f"missing ({first_line(str(missing))})", math.inf
    except Exception as raised:  # whatever a vendor's kernel raises
        return f"raises {type(raised).__name__}: {first_line(str(raised))}", math.inf
    worst = 0.0
    for (name, value), (_, reference) in zip(got, wanted, strict=True):
        if value.shape != reference.shape or value.dtype != reference.dtype:
            return (
                f"{name} is {tuple(value.shape)} {value.dtype}, not {tuple(reference.shape)}"
                f" {reference.dtype}"
            ), math.inf
        error = _error(value, reference)
        if math.isnan(error):
            return f"{name} has NaN where the CPU has none", math.inf
        if error > TOLERANCE:
            return f"wrong value: {name} is off by {error:.2g} of the largest", error
        worst = max(worst, error)
    return "", worst


def _error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference by the largest value; NaN where only `value` is not finite."""
    import torch

    value, reference = value.double(), reference.double()
    finite = torch.isfinite(reference)
    if not torch.equal(value[~finite], reference[~finite]) or not bool(
        torch.isfinite(value[finite]).all()
    ):
        return math.nan
    if not reference[finite].numel():
        return 0.0
    difference = (value - reference)[finite].abs().max()
    return float(difference / reference[finite].abs().max().clamp(min=1e-3))


def _answers(case: Case, device: torch.device) -> list[tuple[str, torch.Tensor]]:
    """Return the outputs and gradients of a case, named, on the CPU."""
    import torch

    inputs = [one.to(device) for one in case.inputs(torch.Generator().manual_seed(0))]
    trained = [one for one in inputs if one.is_floating_point() and case.differentiable]
    for one in trained:
        one.requires_grad_()
    answer = case.compute(*inputs)
    outputs = list(answer) if isinstance(answer, (tuple, list)) else [answer]
    named = [("the result", one) for one in outputs]
    if case.differentiable:
        # Weights other than ones: a backward that drops a factor shows.
        total = sum(
            (one * torch.linspace(0.5, 1.5, one.numel()).reshape(one.shape).to(device)).sum()
            for one in outputs
        )
        gradients = torch.autograd.grad(total, trained)
        named += [(f"the gradient of input {n}", one) for n, one in enumerate(gradients)]
    return [(name, one.detach().cpu()) for name, one in named]


def normal(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], list[torch.Tensor]]:
    """Return a maker of normally distributed inputs of these shapes."""

    def make(generator: torch.Generator) -> list[torch.Tensor]:
        import torch

        return [torch.randn(shape, generator=generator) for shape in shapes]

    return make


def operator_check(group: str) -> Callable[[Context], Finding]:
    """Return the check of one group of `mst.conformance.operator_cases`."""

    def check(context: Context) -> Finding:
        from mst.conformance.operator_cases import cases

        return check_group(context, cases(group))

    check.__doc__ = f"Check the operators of {group} against the CPU."
    return check
