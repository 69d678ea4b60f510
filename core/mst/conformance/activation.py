"""Checks of activation: torch knows the device, and a second activation changes nothing.

Run as `python -m mst.conformance.activation WORKSPACE`: activates, and prints how many devices
torch counts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mst import serial
from mst.conformance.findings import Context, Finding, failed, passed, skipped, verdict
from mst.conformance.subject import (
    DEVICES_USED,
    Subject,
    capabilities,
    devices,
    is_reference,
    own_registry,
)
from mst.probe import activate
from mst.registry import PluginError

if TYPE_CHECKING:
    import torch


def torch_device(subject: Subject, index: int = 0) -> torch.device:
    """Return the torch device of an activated backend that a worker would use."""
    import torch

    kind = capabilities(subject).torch_device
    return torch.device(kind) if kind == "cpu" else torch.device(kind, index)


def visible_devices(subject: Subject) -> int:
    """Return how many devices a worker with the subject's environment should see."""
    if capabilities(subject).visible_devices_env:
        return min(len(devices(subject)), DEVICES_USED)
    return len(devices(subject))


def activation_repeats(context: Context) -> Finding:
    """Check that `mst_activate` works, and a second call in the same process does too."""
    subject = context.subject
    registry = own_registry(subject)
    for time in ("first", "second"):
        try:
            activate(registry, subject.name)
        except PluginError as error:
            return failed(
                f"the {time} mst_activate of a process: {error.__cause__ or error}",
                "return at once when the device is registered already"
                if time == "second"
                else "run `mst doctor`; the worker's environment is what mst_environment returns",
            )
    return passed("two calls, no error")


def torch_knows(context: Context) -> Finding:
    """Check that torch makes tensors on the device, counts it and calls it the accelerator."""
    import torch

    subject = context.subject
    device = torch_device(subject)
    made = torch.ones(4, device=device)
    if made.device != device or float(made.sum().cpu()) != 4:
        return failed(
            f"a tensor made on {device} is on {made.device} and sums to {float(made.sum())}",
            "register the allocator and the guard of the device under its own name",
        )
    if is_reference(subject):
        return passed("torch computes on the CPU by itself")
    current = torch.accelerator.current_accelerator()
    faults = []
    if current is None or current.type != device.type:
        faults.append(f"torch.accelerator.current_accelerator() is {current}, not {device.type}")
    count, wanted = torch.accelerator.device_count(), visible_devices(subject)
    if count < wanted:
        faults.append(f"torch counts {count} devices; the probe says {wanted}")
    if not hasattr(torch.get_device_module(device.type), "is_available"):
        faults.append(f"torch.{device.type} has no is_available()")
    return verdict(
        faults,
        "register the device with torch (PrivateUse1, its hooks and its module) in mst_activate",
        f"{device.type} is torch's accelerator, {count} devices",
        devices=count,
    )


def second_device(context: Context) -> Finding:
    """Check that a tensor can be copied to the second device and back."""
    import torch

    if visible_devices(context.subject) < 2 or is_reference(context.subject):
        return skipped("only one device here; run where there are two")
    first, second = (torch_device(context.subject, index) for index in (0, 1))
    values = torch.arange(1000.0)
    there = values.to(first).to(second)
    faults = []
    if there.device != second:
        faults.append(f"a copy to {second} is on {there.device}")
    if not torch.equal((there * 2).to(first).cpu(), values * 2):
        faults.append(f"values change on the way {first}, {second}, {first}")
    return verdict(faults, "make copy_ work between devices", f"{first} and {second} agree")


def main(arguments: list[str]) -> int:
    """Activate and print torch's count of devices."""
    subject = serial.load(Subject, Path(arguments[0], "subject.json"))
    activate(own_registry(subject), subject.name)
    import torch

    kind = capabilities(subject).torch_device
    print("\n", torch.get_device_module(kind).device_count(), sep="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
