"""Checks of memory: the account is right, its total is the probe's, and running out is an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mst.conformance.activation import torch_device
from mst.conformance.findings import Context, Finding, failed, passed, skipped, verdict
from mst.conformance.processes import first_line
from mst.conformance.subject import devices, is_reference

if TYPE_CHECKING:
    import torch

_ON_CPU = "torch keeps no account of the CPU's memory, which the kernel lends beyond its size"
# A caching allocator rounds a request up to its blocks (CUDA: 2 MiB for those above 1 MiB).
_BLOCK_BYTES = 4 * 2**20
_BYTES = 32 * 2**20
# What a driver keeps for itself shows as a smaller total; more is another device's or unit's.
_TOTAL_TOLERANCE = 0.1


def memory_is_counted(context: Context) -> Finding:
    """Check that allocated bytes rise and fall with a tensor, and that the peak is kept."""
    import torch

    if is_reference(context.subject):
        return skipped(_ON_CPU)
    device, accelerator = torch_device(context.subject), torch.accelerator
    total = devices(context.subject)[0].memory_total_bytes
    asked = min(_BYTES, (total or _BYTES * 8) // 8)
    before = accelerator.memory_allocated(device)
    accelerator.reset_peak_memory_stats(device)
    block = torch.empty(asked, dtype=torch.uint8, device=device)
    during = accelerator.memory_allocated(device) - before
    del block
    after = accelerator.memory_allocated(device) - before
    peak = accelerator.max_memory_allocated(device) - before
    accelerator.reset_peak_memory_stats(device)
    reset = accelerator.max_memory_allocated(device) - before
    faults = []
    if not asked <= during <= asked + _BLOCK_BYTES:
        faults.append(f"memory_allocated rose by {during} for a tensor of {asked} bytes")
    if after != 0:
        faults.append(f"{after} bytes stay allocated after it was deleted")
    if not asked <= peak <= asked + _BLOCK_BYTES:
        faults.append(f"max_memory_allocated rose by {peak} for a tensor of {asked} bytes")
    if reset > _BLOCK_BYTES:
        faults.append(f"reset_peak_memory_stats leaves a peak of {reset} bytes")
    return verdict(
        faults,
        "count in the device's allocator (c10::DeviceAllocator) what is handed out",
        f"rises by {during} for {asked} bytes, falls back to where it was",
    )


def _memory_info(device: torch.device) -> tuple[int, int]:
    """Return free and total bytes by torch; before 2.11 only the device's module says."""
    import torch

    if hasattr(torch.accelerator, "get_memory_info"):
        return torch.accelerator.get_memory_info(device)
    found: tuple[int, int] = torch.get_device_module(device).mem_get_info(device)
    return found


def total_is_the_probes(context: Context) -> Finding:
    """Check that torch and the probe agree about the size of the memory."""

    if is_reference(context.subject):
        return skipped(_ON_CPU)
    free, total = _memory_info(torch_device(context.subject))
    probed = devices(context.subject)[0].memory_total_bytes
    if probed is None:
        return skipped(f"the probe does not know memory_total_bytes; torch says {total}")
    faults = []
    if abs(total - probed) > _TOTAL_TOLERANCE * max(total, probed):
        faults.append(f"memory_total_bytes is {probed} by the probe, {total} by torch.accelerator")
    if not 0 < free <= total:
        faults.append(f"torch.accelerator says {free} bytes free of {total}")
    return verdict(
        faults,
        "mend whichever is wrong: plans are made from the probe's figure",
        f"{total / 2**30:.2f} GiB by torch, {probed / 2**30:.2f} by the probe",
        torch_total_bytes=total,
        probe_total_bytes=probed,
    )


def running_out_is_caught(context: Context) -> Finding:
    """Check that asking for too much raises torch.OutOfMemoryError and the device goes on."""
    import torch

    if is_reference(context.subject):
        return skipped(_ON_CPU)
    device = torch_device(context.subject)
    total = _memory_info(device)[1]
    for pieces in (1, 8):
        context.at(f"{pieces} pieces")
        fault = _exhaust(device, total // pieces + 2**20, pieces)
        if fault:
            return failed(
                fault,
                "raise torch.OutOfMemoryError (C++: OutOfMemoryError) when the device is full",
            )
    if float(torch.ones(1000, device=device).sum().cpu()) != 1000:
        return failed("the device computes wrongly after it ran out", "free what failed halfway")
    return passed("torch.OutOfMemoryError, at once and piece by piece; it works afterwards")


def _exhaust(device: torch.device, piece_bytes: int, pieces: int) -> str:
    """Ask for `pieces` pieces that don't fit together, and return what went wrong, or ""."""
    import torch

    held = []
    try:
        for _ in range(pieces):
            held.append(torch.empty(piece_bytes, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        return ""
    except Exception as error:
        return (
            f"running out raises {type(error).__name__} ({first_line(str(error))}), not"
            " torch.OutOfMemoryError, so no job can recover"
        )
    asked = piece_bytes * pieces
    return f"{asked} bytes in {pieces} pieces were handed out: more than the device has"
