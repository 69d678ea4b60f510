"""Whether checkpoints are written beside the steps that follow them, from a copy."""

from __future__ import annotations

from dataclasses import replace

from mst.candidates import memory_of
from mst.configuration import ZERO_STAGES, Configuration
from mst.errors import PlanError
from mst.memory_bounds import lacks
from mst.plan import Reason
from mst.quantities import gib
from mst.ranking import Candidate
from mst.space import Space


def saving(space: Space, chosen: Candidate, made: Configuration) -> tuple[bool, Reason | None]:
    """Return whether checkpoints are written beside the steps, and why or why not.

    Args:
        space: what could be chosen from.
        chosen: the candidate that was taken.
        made: its configuration, with what was decided of it since.

    Raises:
        PlanError: it was asked for, and can't be.
    """
    asked = space.request.async_save
    if asked == "off":
        return False, None
    obstacle = ""
    if ZERO_STAGES[made.strategy]:
        obstacle = "DeepSpeed's ranks gather what they share out for each save, in step"
    if asked == "on":
        if obstacle:
            raise PlanError(
                f"--async-save on was asked for: with {made.strategy} {obstacle}. Pass --async-save"
                " off."
            )
        return True, None
    if obstacle:
        return False, Reason("async_save", "off", obstacle)
    alone = memory_of(space, replace(made, async_save=False))
    copied = memory_of(space, replace(made, async_save=True))
    size = copied.peak_bytes + copied.host_bytes - alone.peak_bytes - alone.host_bytes
    what = f"a copy of weights and moments takes {gib(size)}"
    if short := lacks(space, copied, chosen.devices):
        return False, Reason("async_save", "off", f"{what}; with it the plan {short}")
    why = f"{what}, and the steps go on while it is written"
    return True, Reason("async_save", "on", why)
