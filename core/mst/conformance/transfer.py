"""Checks of checkpoints: what is saved on one device is the same on another, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mst.conformance.activation import torch_device, visible_devices
from mst.conformance.findings import Context, Finding, skipped, verdict
from mst.conformance.processes import first_line
from mst.conformance.subject import devices, is_reference

if TYPE_CHECKING:
    import torch


def _tensors(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(3)
    found = {
        name: torch.randn(37, 5, generator=generator).to(getattr(torch, name))
        for name in names
        if getattr(torch, name).is_floating_point
    }
    found["int64"] = torch.arange(-5, 40)
    found["bool"] = torch.arange(9) % 2 == 0
    return found


def _round_trip(
    source: torch.device, target: torch.device, names: tuple[str, ...], path: Path
) -> list[str]:
    """Save on `source`, load on the CPU and on `target`; return what is different."""
    import torch
    from safetensors.torch import load_file, save_file

    wanted = _tensors(names)
    faults = []
    try:
        save_file({name: one.to(source) for name, one in wanted.items()}, path)
        for name, one in load_file(path).items():
            if one.dtype != wanted[name].dtype or not torch.equal(one, wanted[name]):
                faults.append(f"{name} saved on {source} differs when loaded on the CPU")
            there = one.to(target)
            if there.device != target or not torch.equal(there.cpu(), wanted[name]):
                faults.append(f"{name} differs when loaded on {target}")
    except Exception as error:
        faults.append(f"{source} to {target}: {type(error).__name__}: {first_line(str(error))}")
    return faults


def checkpoint_returns(context: Context) -> Finding:
    """Check that a safetensors file of the device's tensors is right on the CPU and back."""
    device = torch_device(context.subject)
    names = devices(context.subject)[0].dtypes
    faults = _round_trip(device, device, names, context.workspace / "checkpoint.safetensors")
    return verdict(
        faults,
        "make copies between the device and the CPU exact in every declared dtype",
        f"{', '.join(names)}, int64 and bool are the same bit for bit",
    )


def checkpoint_crosses(context: Context) -> Finding:
    """Check that what the first device saved loads on the second."""
    if visible_devices(context.subject) < 2 or is_reference(context.subject):
        return skipped("only one device here; run where there are two")
    first, second = (torch_device(context.subject, index) for index in (0, 1))
    names = devices(context.subject)[0].dtypes
    faults = _round_trip(first, second, names, context.workspace / "crossing.safetensors")
    return verdict(
        faults, "make copies to every device exact", f"saved on {first}, the same on {second}"
    )
