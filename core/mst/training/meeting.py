"""Where the ranks of a job meet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def meeting_place(meeting: str, run: Path, rank: int, world_size: int) -> Any:
    """Return where the ranks meet: a file in `run`, or a store when they are on several machines.

    Raises:
        RunError: the ranks don't all reach each other.
    """
    if not meeting.startswith("{"):
        return run / meeting
    from datetime import timedelta

    import torch

    from mst.training.parallel import TIMEOUT
    from mst.training.preflight import preflight

    where = json.loads(meeting)
    distributed: Any = torch.distributed
    store = distributed.TCPStore(
        where["address"], where["port"], wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    store = distributed.PrefixStore(where["prefix"], store)
    preflight(store, rank, world_size, where["interface"], where["own"])
    store.set_timeout(TIMEOUT)
    return store
