"""A worker's task, which its parts hand on: what was asked, what is done, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mst.seal.keys.ring import NO_KEYS, KeyRing

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mst.data.prepare import Prepared
    from mst.plan import Plan
    from mst.request import TrainRequest
    from mst.rundir import RunManifest
    from mst.training.parallel import Group
    from mst.worker_process import StopAsked


@dataclass(frozen=True)
class Training:
    """What the parts of a worker's task share.

    Attributes:
        run: the run directory.
        console: where the user reads; silent but on rank 0.
        stop: says when the user wants the run to end.
        request: what was asked, spelt out.
        plan: what is done.
        manifest: as it was when the worker began.
        prepared: the encoded rows.
        model: ready to be trained, on `device`.
        device: of this rank.
        group: this rank's place.
        keys: of an encrypted run, on rank 0, which alone reads and writes it.
    """

    run: Path
    console: Console
    stop: StopAsked
    request: TrainRequest
    plan: Plan
    manifest: RunManifest
    prepared: Prepared
    model: torch.nn.Module
    device: torch.device
    group: Group
    keys: KeyRing = NO_KEYS
