"""The peak memory of this process on its device, as the forecast counts it."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def trim_heap() -> None:
    """Give back to the system what was freed; glibc would keep it resident."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak(device: torch.device) -> None:
    """Begin a new peak, so that loading and measuring before training don't count."""
    import torch

    if device.type == "cpu":
        # What loading and measuring have freed goes back first.
        trim_heap()
        # Linux, proc(5): writing 5 resets the peak resident set size. Kernels without it, and
        # the jail, whose Landlock lets nothing be written in /proc, keep the peak since the process
        # began, which is never less.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.accelerator.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Return the peak since `reset_peak`: resident set on a CPU, reserved memory elsewhere."""
    import torch

    if device.type != "cpu":
        return int(torch.accelerator.max_memory_reserved(device))
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
