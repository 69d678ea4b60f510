"""Where this process stands among those that share a job, on one machine or on several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mst.errors import UsageError
from mst.request import TrainRequest


@dataclass(frozen=True)
class Placement:
    """One `mst train` among several that work on one job; each starts its own workers.

    Attributes:
        starter: who started it: "torchrun", "srun" or "mst" (a command typed on each machine).
        seat: its number; seat 0 plans and owns the run directory.
        seats: how many there are.
        first_rank: rank of its first worker.
        first_device: of this machine's devices that its workers use, the first.
        devices: workers that it starts; None when seat 0's plan says.
        nnodes: machines in all.
        devices_per_node: workers of each machine; None when the plan says.
        address: of the machine where all meet.
        port: there.
        hosted: somebody else listens there already.
        attempt: of a starter that starts again what has failed.
    """

    starter: str
    seat: int
    seats: int
    first_rank: int
    first_device: int
    devices: int | None
    nnodes: int
    devices_per_node: int | None
    address: str
    port: int
    hosted: bool = False
    attempt: str = "0"


def placement(environ: Mapping[str, str], request: TrainRequest) -> Placement | None:
    """Return this process's place, or None when it is alone.

    Args:
        environ: the process's environment, in which torchrun (also DeepSpeed's launcher) and srun
            say where they have put it.
        request: `nnodes` and what belongs to it, for commands typed on each machine.

    Raises:
        UsageError: what was said does not fit together.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _torchrun(environ)
    # An allocation has such variables too; a step that was started by srun has a process's own.
    if "SLURM_PROCID" in environ and _number(environ, "SLURM_NTASKS", 1) > 1:
        return _srun(environ, request)
    return _typed(request) if request.nnodes > 1 else None


def _torchrun(environ: Mapping[str, str]) -> Placement | None:
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        raise UsageError(
            f"RANK and WORLD_SIZE are set, as torchrun and DeepSpeed's launcher set them, but not"
            f" {', '.join(missing)}. Unset RANK to train alone, or start with torchrun -m mst."
        )
    rank, world = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    local = _number(environ, "LOCAL_RANK")
    here = _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "LOCAL_SIZE", world))
    if world % here:
        raise UsageError(
            f"{world} processes were started, {here} of them on this machine: mst wants as many on"
            " every machine. Start torchrun with the same --nproc-per-node everywhere."
        )
    return Placement(
        starter="torchrun",
        seat=rank,
        seats=world,
        first_rank=rank,
        first_device=local,
        devices=1,
        nnodes=world // here,
        devices_per_node=here,
        address=environ["MASTER_ADDR"],
        port=_number(environ, "MASTER_PORT"),
        hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _srun(environ: Mapping[str, str], request: TrainRequest) -> Placement:
    rank, world = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NTASKS")
    nodes = _number(environ, "SLURM_NNODES", _number(environ, "SLURM_JOB_NUM_NODES", 1))
    if world % nodes:
        raise UsageError(
            f"srun started {world} processes on {nodes} machines: mst wants as many on every"
            " machine. Pass --ntasks-per-node."
        )
    address = request.master_addr or first_host(
        environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", "localhost"))
    )
    return Placement(
        starter="srun",
        seat=rank,
        seats=world,
        first_rank=rank,
        first_device=_number(environ, "SLURM_LOCALID", 0),
        devices=1,
        nnodes=nodes,
        devices_per_node=world // nodes,
        address=address,
        port=request.master_port,
        attempt=environ.get("SLURM_STEP_ID", "0"),
    )


def _typed(request: TrainRequest) -> Placement:
    if request.master_addr is None:
        raise UsageError(
            f"--nnodes {request.nnodes} needs --master-addr: the address of machine 0, as the"
            " others reach it. Type the same command on each, with its own --node-rank."
        )
    if request.node_rank >= request.nnodes:
        raise UsageError(
            f"--node-rank {request.node_rank} is not below --nnodes {request.nnodes}: machines"
            f" count from 0 to {request.nnodes - 1}."
        )
    return Placement(
        starter="mst",
        seat=request.node_rank,
        seats=request.nnodes,
        first_rank=-1,  # as many a machine as the plan says
        first_device=0,
        devices=request.nproc_per_node,
        nnodes=request.nnodes,
        devices_per_node=request.nproc_per_node,
        address=request.master_addr,
        port=request.master_port,
    )


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's list, such as "gpu[03-05,9],login" (its man page `srun`)."""
    name, bracket, rest = nodes.partition("[")
    if "," in name or not bracket:
        return name.partition(",")[0]
    return name + re.split(r"[-,\]]", rest, maxsplit=1)[0] + re.sub(r"^[^\]]*\]|,.*$", "", rest)


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise UsageError(f"{name} is {text!r}, which is no number. Unset it to train alone.")
    return int(text)
