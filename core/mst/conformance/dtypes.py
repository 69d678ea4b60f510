"""Checks of dtypes: those that are declared compute, others are refused before a job starts."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from mst.conformance.activation import torch_device
from mst.conformance.findings import Context, Finding, skipped, verdict
from mst.conformance.processes import first_line, last_line, start, wait
from mst.conformance.subject import devices
from mst.conformance.tiny import plan_arguments

if TYPE_CHECKING:
    import torch

TRAINING_DTYPES = ("bfloat16", "float16", "float32")
# Allowed errors in units in the last place. A 16-bit product is summed in float32 and rounded once,
# and its gradients once more; a float32 one is rounded at each of its 64 terms.
UNITS, UNITS_FLOAT32 = 4, 32
_PLAN_SECONDS = 120.0


def product_fault(device: torch.device, name: str) -> tuple[str, float]:
    """Return how a product and its gradients in one dtype go wrong, or "", and the worst error."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator).to(dtype) for _ in range(2))
    try:
        got = _product(left.to(device), right.to(device))
    except Exception as error:  # torch raises RuntimeError, TypeError, NotImplementedError …
        return f"{name}: {type(error).__name__}: {first_line(str(error))}", math.inf
    worst = 0.0
    for value, wanted in zip(got, _product(left.float(), right.float()), strict=True):
        if value.dtype != dtype:
            return f"{name}: the product comes back as {value.dtype}", math.inf
        value = value.float()
        if not bool(torch.isfinite(value).all()):
            return f"{name}: the product is not finite", math.inf
        worst = max(worst, float((value - wanted).abs().max() / wanted.abs().max()))
    limit = (UNITS_FLOAT32 if name == "float32" else UNITS) * torch.finfo(dtype).eps
    if worst > limit:
        return f"{name}: the product is off by {worst:.2g} of its size; {limit:.2g} may be", worst
    return "", worst


def _product(left: torch.Tensor, right: torch.Tensor) -> list[torch.Tensor]:
    left, right = (one.detach().clone().requires_grad_() for one in (left, right))
    product = left @ right
    product.backward(product.detach() / 8)  # type: ignore[no-untyped-call]
    assert left.grad is not None
    assert right.grad is not None
    return [one.detach().cpu() for one in (product, left.grad, right.grad)]


def declared_dtypes(context: Context) -> Finding:
    """Check that each declared dtype multiplies, forward and backward, as the CPU does."""
    device = torch_device(context.subject)
    declared = devices(context.subject)[0].dtypes
    faults, errors = [], {}
    for name in declared:
        context.at(name)
        fault, errors[name] = product_fault(device, name)
        faults += [f"declares {fault}"] if fault else []
    spare = [
        name
        for name in TRAINING_DTYPES
        if name not in declared and not product_fault(device, name)[0]
    ]
    also = f"; {', '.join(spare)} would work, though not declared" if spare else ""
    return verdict(
        faults,
        "declare in DeviceFacts.dtypes only what the chip computes",
        f"{', '.join(declared)} agree with the CPU{also}",
        relative_error={name: error for name, error in errors.items() if math.isfinite(error)},
        undeclared_but_working=spare,
    )


def undeclared_dtypes(context: Context) -> Finding:
    """Check that `mst plan` refuses each dtype that is not declared."""
    declared = devices(context.subject)[0].dtypes
    others = [name for name in TRAINING_DTYPES if name not in declared]
    if not others:
        return skipped("the device declares every dtype that mst trains in")
    faults = []
    for name in others:
        context.at(name)
        arguments = plan_arguments(context.workspace, context.subject.name, name)
        ended = wait(start("mst", ["plan", *arguments], os.environ), _PLAN_SECONDS)
        if ended.code == 0:
            faults.append(f"mst plans a job in {name}, which is not declared")
        elif "--dtype" not in ended.errors:
            faults.append(f"{name} is refused for another reason: {last_line(ended.errors)}")
    return verdict(
        faults,
        "report this to the mst project: its planner should refuse",
        f"{', '.join(others)} refused by the planner",
        refused=others,
    )
