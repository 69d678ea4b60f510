"""One of two ranks that talk through the backend's collectives.

Run as `python -m mst.conformance.ranks WORKSPACE RANK WORLD_SIZE DEVICES`: each rank writes what
went wrong to `rank-RANK.json` in the workspace, as a list of texts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mst import serial
from mst.conformance.activation import torch_device
from mst.conformance.processes import first_line
from mst.conformance.subject import Subject, capabilities, own_registry
from mst.probe import activate

if TYPE_CHECKING:
    import torch

# Both ranks have started by then on the slowest machine; a collective itself takes milliseconds.
_SECONDS = 60


def collective_faults(rank: int, world: int, device: torch.device) -> Iterator[str]:
    """Run each collective that data parallelism uses, and yield those with wrong values."""
    import torch
    import torch.distributed as dist

    base = torch.arange(1000.0)
    mine = (base + rank).to(device)
    dist.all_reduce(mine)
    if not torch.equal(mine.cpu(), base * world + sum(range(world))):
        yield "all_reduce: the sum is wrong"
    shared = (base * (rank + 2)).to(device)
    dist.broadcast(shared, src=0)
    if not torch.equal(shared.cpu(), base * 2):
        yield "broadcast: values differ from those of rank 0"
    parts = [torch.empty(1000, device=device) for _ in range(world)]
    dist.all_gather(parts, (base * (rank + 1)).to(device))
    if not all(torch.equal(one.cpu(), base * (index + 1)) for index, one in enumerate(parts)):
        yield "all_gather: a part is wrong"
    dist.barrier()


def parallel_faults(rank: int, world: int, device: torch.device) -> Iterator[str]:
    """Yield how the gradients of DistributedDataParallel differ from those of one process."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        layers = (torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
        return torch.nn.Sequential(*layers)

    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    whole = model()
    whole(rows).square().mean().backward()
    parallel = DistributedDataParallel(model().to(device))
    share = rows.chunk(world)[rank].to(device)
    parallel(share).square().mean().backward()
    for (name, one), other in zip(
        whole.named_parameters(), parallel.module.parameters(), strict=True
    ):
        assert one.grad is not None
        if other.grad is None:
            yield f"DistributedDataParallel: {name} has no gradient"
            return
        error = float((other.grad.cpu() - one.grad).abs().max() / one.grad.abs().max())
        if not error < 1e-5:
            yield f"DistributedDataParallel: the gradient of {name} is off by {error:.2g}"
            return


def main(arguments: list[str]) -> int:
    """Join the other rank, run every collective, and write what went wrong."""
    workspace = Path(arguments[0])
    rank, world, count = map(int, arguments[1:])
    subject = serial.load(Subject, workspace / "subject.json")
    activate(own_registry(subject), subject.name)
    import torch
    import torch.distributed as dist

    device = torch_device(subject, rank % count)
    if device.type != "cpu":
        torch.accelerator.set_device_index(rank % count)
    faults: list[str] = []
    try:
        dist.init_process_group(
            capabilities(subject).distributed_backend,
            init_method=f"file://{workspace}/rendezvous-{world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=_SECONDS),
        )
        faults += collective_faults(rank, world, device)
        faults += parallel_faults(rank, world, device)
    except Exception as error:
        faults.append(f"raises {type(error).__name__}: {first_line(str(error))}")
    (workspace / f"rank-{world}-{rank}.json").write_text(json.dumps(faults), encoding="utf-8")
    if dist.is_initialized() and not faults:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # The findings are on disk. torch's own threads now and then abort the interpreter's way out
    # after a backward pass (github.com/pytorch/pytorch/issues/190489).
    os._exit(code)
