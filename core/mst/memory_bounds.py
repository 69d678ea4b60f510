"""What memory a plan may take of each device, and of the host, and what it lacks of that."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mst.facts import DeviceFacts
from mst.plan import MemoryForecast
from mst.quantities import gib

if TYPE_CHECKING:
    from mst.space import Space

# The share of the free memory that a plan may fill; of `--memory-budget` it may fill all.
MEMORY_SHARE = 0.9


def lacks(space: Space, memory: MemoryForecast, count: int) -> str:
    """Return what is short and by how much, or "" when it fits; `count` devices are used."""
    usable = usable_bytes(space, count)
    if usable is not None and memory.peak_bytes > usable:
        return (
            f"needs {gib(memory.peak_bytes)} a device, {usable_words(space, count)}:"
            f" {gib(memory.peak_bytes - usable)} short"
        )
    if memory.host_bytes:
        if space.host_bytes is None:
            return f"needs {gib(memory.host_bytes)} of the host's memory, whose size is not known"
        if memory.host_bytes > space.host_bytes * MEMORY_SHARE:
            return (
                f"needs {gib(memory.host_bytes)} of the host's memory,"
                f" {gib(space.host_bytes * MEMORY_SHARE)} may be used"
            )
    return ""


def usable_bytes(space: Space, count: int) -> float | None:
    """Return what a plan may take of a device's memory; None when nothing bounds it.

    Of what is free, a share is left to others and to the forecast's error. A budget says itself
    what is left, so all of it may be taken.

    Args:
        space: what could be chosen from.
        count: devices of a machine that are used; processes on a CPU share its memory.
    """
    limits = [each for each in (_share_of_free(space), space.budget_bytes) if each is not None]
    shared = count if space.capabilities.torch_device == "cpu" else 1
    return min(limits) / shared if limits else None


def usable_words(space: Space, count: int) -> str:
    """Return `usable_bytes` for a reason, with the budget named where it is the bound."""
    usable = usable_bytes(space, count)
    bound = " (--memory-budget)" if budget_binds(space) else ""
    return "" if usable is None else f"{gib(usable)} may be used{bound}"


def budget_binds(space: Space) -> bool:
    """Return whether the user's budget bounds plans, rather than what is free."""
    share = _share_of_free(space)
    return space.budget_bytes is not None and (share is None or space.budget_bytes <= share)


def _share_of_free(space: Space) -> float | None:
    free = scarcest(space).memory_free_bytes
    return None if free is None else free * MEMORY_SHARE


def scarcest(space: Space) -> DeviceFacts:
    """Return the device that limits the others: the one with the least free memory known."""
    return min(
        space.devices,
        key=lambda each: math.inf if each.memory_free_bytes is None else each.memory_free_bytes,
    )
