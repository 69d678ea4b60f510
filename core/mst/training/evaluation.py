"""Loss and metrics on the held-out rows: one global batch, without gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mst.training import parallel
from mst.training.micro_batches import (
    LOSS,
    TOKENS,
    add,
    counted,
    part_of,
    preludes,
    share_of,
    summed_names,
)

if TYPE_CHECKING:
    from mst.training.session import Session


def held_out(session: Session, micro_batch: int | None = None) -> tuple[float, dict[str, float]]:
    """Return the objective's loss and metrics over all held-out rows.

    Args:
        session: its ranks share the rows.
        micro_batch: rows at a time; default the plan's.
    """
    import torch

    size = micro_batch or session.plan.per_device_train_batch_size
    places = [(place,) for place in range(len(session.val))]
    micros = [tuple(places[i : i + size]) for i in range(0, len(places), size)]
    share = share_of(session, session.val, micros)
    passed: dict[str, float] = {}
    session.model.eval()
    try:
        with torch.no_grad(), parallel.peers_may_fail(session.device):
            before, sums = preludes(session, share, 0)
            known = counted(session, share, sums)
            for place, each in enumerate(before):
                part = part_of(session, each, known)
                if place < share.own:
                    add(passed, {LOSS: part.loss, **part.metrics})
    finally:
        session.model.train()
    found = summed_names(session, share, passed)
    del found[TOKENS]
    return found.pop(LOSS), found


def held_out_loss(session: Session) -> float:
    """Return the objective's loss over all held-out rows."""
    return held_out(session)[0]
