"""The workers of a plan on this machine: what they find in their environment, and their end."""

from __future__ import annotations

import importlib.util
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from mst import rundir
from mst.configuration import ZERO_STAGES
from mst.durable import write_text
from mst.errors import PlanError
from mst.plan import Plan
from mst.request import TrainRequest
from mst.seats import Seats

# What libraries compile for a run, beside it: no other run waits for its locks.
_BUILDS = ".builds"


def write_deepspeed(path: Path, plan: Plan, request: TrainRequest) -> None:
    """Write DeepSpeed's configuration into the run directory.

    Raises:
        PlanError: the user's file contradicts the plan, or DeepSpeed can't do what it says.
    """
    from mst.training import deepspeed_config

    if importlib.util.find_spec("deepspeed") is None:
        raise PlanError(
            f"the plan is {plan.strategy}, which needs DeepSpeed: DS_BUILD_OPS=0 python -m pip"
            " install 'mst-train[deepspeed]'. Or pass --deepspeed off."
        )
    config = deepspeed_config.config_of(plan, request)
    write_text(path / deepspeed_config.DEEPSPEED, json.dumps(config, indent=2) + "\n")


def run_workers(
    path: Path,
    plan: Plan,
    environ: Mapping[str, str],
    seats: Seats | None,
    keep_open: Sequence[int],
    keys: int | None = None,
) -> int:
    """Run this process's share of a plan's workers in the foreground; return their exit code.

    Args:
        path: the run directory, or on other machines a copy of its documents.
        plan: as written there.
        environ: the user's environment.
        seats: where the other machines' commands are met; None when there are none.
        keep_open: file descriptors that the workers inherit.
        keys: file descriptor that holds keys of data; see `mst.seal.keys.ring.handed_down`.
    """
    from mst.launch import run_ranks, worker_environment
    from mst.seats import first_cause, tell_end, watcher
    from mst.training.zero import environment as deepspeed_environment

    interface = seats.interface if seats else "lo"
    environment = worker_environment(environ, plan.environment, interface)
    if seats:
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if ZERO_STAGES[plan.strategy]:
        device_type = plan.torch_devices[0].partition(":")[0]
        environment |= deepspeed_environment(device_type, str(path / _BUILDS))
    # Ranks meet in a file of this attempt's own; what a killed one left is not met again.
    meeting = seats.meeting if seats else rundir.RENDEZVOUS + secrets.token_hex(8)
    here = len(plan.torch_devices)
    held = [] if keys is None else [str(keys)]
    ranks = seats.ranks(here) if seats else range(here)
    try:
        code = run_ranks(
            "mst.training.worker",
            [[str(path), str(rank), meeting, *held] for rank in ranks],
            environment,
            (*keep_open, *map(int, held)),
            watcher(seats) if seats else None,
            path / rundir.SEAL,
        )
    finally:
        for each in path.glob(f"{rundir.RENDEZVOUS}*"):
            each.unlink(missing_ok=True)
        shutil.rmtree(path / _BUILDS, ignore_errors=True)
    if seats:
        tell_end(seats, code)
        code = first_cause(seats, code)
    return code
