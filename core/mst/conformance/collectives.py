"""Check of the collectives: two processes agree on sums, copies, parts and gradients."""

from __future__ import annotations

import json
from collections.abc import Mapping

from mst.conformance.activation import visible_devices
from mst.conformance.findings import Context, Finding, skipped, verdict
from mst.conformance.processes import device_environment, ending, start, wait
from mst.conformance.subject import capabilities

_SECONDS = 120.0


def collectives_agree(context: Context) -> Finding:
    """Check all_reduce, broadcast, all_gather, barrier and the gradients of DDP."""
    subject = context.subject
    ability = capabilities(subject)
    if "ddp" not in ability.strategies:
        return skipped("'ddp' is not among the strategies that the backend declares")
    count = 1 if ability.torch_device == "cpu" else min(2, visible_devices(subject))
    faults = _run(context, 2, count)
    where = f"2 processes on {count} device{'s' if count > 1 else ''}"
    if count == 1 and faults and all("raises" in fault for fault in faults):
        # NCCL and its like refuse two ranks on one device.
        context.at("one rank")
        if not _run(context, 1, 1):
            return skipped(
                f"two ranks on the only device are refused ({faults[0]}); one rank works."
                " Run where there are two devices"
            )
    return verdict(
        faults,
        f"mend the torch.distributed backend {ability.distributed_backend!r}",
        f"{ability.distributed_backend}: all_reduce, broadcast, all_gather, barrier and DDP's"
        f" gradients are right in {where}",
    )


def _run(context: Context, world: int, count: int) -> list[str]:
    """Run the ranks and return their faults, each with its rank."""
    (context.workspace / f"rendezvous-{world}").unlink(missing_ok=True)
    environment: Mapping[str, str] = device_environment(context.subject.environment)
    children = [
        start(
            "mst.conformance.ranks",
            [str(context.workspace), str(rank), str(world), str(count)],
            environment,
        )
        for rank in range(world)
    ]
    faults = []
    for rank, child in enumerate(children):
        context.at(f"rank {rank} of {world}")
        ended = wait(child, _SECONDS)
        if ended.code != 0:
            faults.append(f"rank {rank} {ending(ended, _SECONDS)}")
            continue
        path = context.workspace / f"rank-{world}-{rank}.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        faults += [f"rank {rank}: {fault}" for fault in found]
    return faults
