"""Data parallelism: what the ranks of one job tell each other, and nothing else.

Gradients are summed once a step, after the last backward pass, and not overlapped with it by
torch's DistributedDataParallel: its hooks wait for every rank inside the backward pass, so one rank
that runs out of memory would hang all others. Here the ranks first agree that all came through.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.errors import MstError, PeerFailed
from mst.training.faults import answers

if TYPE_CHECKING:
    import torch

# Rank 0 alone measures accuracies, between collectives; a rank that dies closes its connections at
# once, so a long patience delays no error.
TIMEOUT = timedelta(hours=6)
# As torch's DistributedDataParallel: larger buckets cost memory, smaller ones latency.
BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Group:
    """This process's place among the ranks of its job; alone when `world_size` is 1."""

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and talks to the user."""
        return self.rank == 0


ALONE = Group()


def join(
    rank: int,
    world_size: int,
    device: torch.device,
    backend: str,
    rendezvous: Any,
    always: bool = False,
) -> Group:
    """Meet the other ranks and return this one's place.

    Args:
        rank: from 0.
        world_size: ranks in all; 1 meets nobody.
        device: of this rank.
        backend: torch.distributed's name for the device's collectives.
        rendezvous: path of a file that no earlier job has used, or torch's store that all ranks
            reach; every rank gets the same.
        always: form a group of one too; DeepSpeed wants one.

    Raises:
        MstError: the collectives can't be started.
    """
    import torch

    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    if world_size == 1 and not always:
        return ALONE
    # Small agreements go over the host, so that they work while a device is out of memory.
    both = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{backend}"
    where: dict[str, Any] = (
        {"init_method": rendezvous.as_uri()}
        if isinstance(rendezvous, Path)
        else {"store": rendezvous}
    )
    try:
        torch.distributed.init_process_group(
            both,
            **where,
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise MstError(
            f"the collectives {backend!r} of {device} could not be started:"
            f" {str(error).splitlines()[0][:200]}. Train on one device with --nproc-per-node 1, or"
            " see `mst doctor`."
        ) from None
    return Group(rank, world_size)


def leave(group: Group) -> None:
    """Part from the other ranks."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def highest(group: Group, value: int) -> int:
    """Return the largest `value` of all ranks.

    Raises:
        PeerFailed: another rank has died.
    """
    import torch

    if group.world_size == 1:
        return value
    shared = torch.tensor([value])
    _reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)


def summed(group: Group, values: Sequence[float]) -> list[float]:
    """Return each value summed over all ranks, in float64.

    Raises:
        PeerFailed: another rank has died.
    """
    import torch

    if group.world_size == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64)
    _reduce(shared, torch.distributed.ReduceOp.SUM)
    return [float(each) for each in shared]


def all_names(group: Group, names: Iterable[str]) -> list[str]:
    """Return the names that any rank has, sorted; every rank gets the same.

    Raises:
        PeerFailed: another rank has died.
    """
    import torch

    own = json.dumps(sorted(names)).encode()
    if group.world_size == 1:
        return json.loads(own)  # type: ignore[no-any-return]
    length = highest(group, len(own))
    padded = torch.frombuffer(bytearray(own.ljust(length)), dtype=torch.uint8)
    parts = gathered(group, {"names": padded})
    texts = [each.numpy().tobytes().decode() for each in parts.values()]
    return sorted({name for text in texts for name in json.loads(text)})


def summed_tensor(group: Group, values: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the host summed over all ranks.

    Raises:
        PeerFailed: another rank has died.
    """
    import torch

    if group.world_size > 1:
        _reduce(values, torch.distributed.ReduceOp.SUM)
    return values


def sum_gradients(group: Group, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum each parameter's gradient over all ranks, in place.

    Raises:
        PeerFailed: another rank has died.
    """
    import torch

    if group.world_size == 1:
        return
    for bucket in _buckets(list(parameters)):
        for each in bucket:
            if each.grad is None:  # this rank had no rows in the step
                each.grad = torch.zeros_like(each)
        gradients = [each.grad for each in bucket if each.grad is not None]
        flat = torch.cat([each.reshape(-1) for each in gradients])
        _reduce(flat, torch.distributed.ReduceOp.SUM)
        parts = torch.split(flat, [each.numel() for each in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    buckets: list[list[torch.nn.Parameter]] = []
    size = 0
    for each in parameters:
        own = each.numel() * each.element_size()
        if not buckets or size + own > BUCKET_BYTES or buckets[-1][0].dtype != each.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(each)
        size += own
    return buckets


def share_weights(group: Group, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every rank the trained weights of rank 0: they drew them alike, this makes sure.

    Raises:
        PeerFailed: another rank has died.
    """
    import torch

    if group.world_size == 1:
        return
    try:
        for each in parameters:
            torch.distributed.broadcast(each.data, 0)
    except RuntimeError as error:
        raise PeerFailed from error


def share_text(group: Group, text: str) -> str:
    """Return the text that rank 0 has.

    Args:
        group: this rank's place.
        text: of rank 0; that of the others is not looked at.

    Raises:
        PeerFailed: another rank has died.
    """
    import torch

    if group.world_size == 1:
        return text
    data = text.encode()
    length = highest(group, len(data) if group.first else 0)
    buffer = (
        torch.frombuffer(bytearray(data if group.first else length), dtype=torch.uint8)
        if length
        else torch.zeros(0, dtype=torch.uint8)
    )
    try:
        if length:
            torch.distributed.broadcast(buffer, 0)
    except RuntimeError as error:
        raise PeerFailed from error
    return buffer.numpy().tobytes().decode()


def shared_tensors(
    group: Group, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors that rank 0 has, on every rank, one at a time.

    Args:
        group: this rank's place.
        tensors: on the host; those of the other ranks are not looked at.

    Raises:
        PeerFailed: another rank has died.
    """
    import torch

    if group.world_size == 1:
        yield from tensors.items()
        return
    shapes = [[key, str(each.dtype)[6:], list(each.shape)] for key, each in tensors.items()]
    for name, dtype, shape in json.loads(share_text(group, json.dumps(shapes))):
        value = (
            tensors[name].contiguous()
            if group.first
            else torch.empty(shape, dtype=getattr(torch, dtype))
        )
        try:
            # As bytes: gloo knows few dtypes.
            torch.distributed.broadcast(value.reshape(-1).view(torch.uint8), 0)
        except RuntimeError as error:
            raise PeerFailed from error
        yield name, value


def gathered(group: Group, states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return every rank's tensors, those of rank N > 0 under "name.N".

    Args:
        group: this rank's place.
        states: tensors on the host, of the same names and shapes on every rank.

    Raises:
        PeerFailed: another rank has died.
    """
    import torch

    if group.world_size == 1:
        return dict(states)
    found = {}
    for name, state in states.items():
        parts = [torch.empty_like(state) for _ in range(group.world_size)]
        try:
            torch.distributed.all_gather(parts, state)
        except RuntimeError as error:
            raise PeerFailed from error
        for rank, part in enumerate(parts):
            found[rank_name(name, rank)] = part
    return found


def rank_name(name: str, rank: int) -> str:
    """Return the name under which `gathered` returns a rank's tensor."""
    return f"{name}.{rank}" if rank else name


@contextlib.contextmanager
def peers_may_fail(device: torch.device) -> Iterator[None]:
    """Tell a peer's end in the middle of a library's collective from a fault of this rank.

    Args:
        device: of this rank.

    Raises:
        PeerFailed: the connection to another rank has ended.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        # gloo raises plain errors, with the place in its source; NCCL and HCCL have a class.
        of_peers = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if isinstance(error, torch.OutOfMemoryError) or not of_peers or not answers(device):
            raise
        raise PeerFailed from error


def _reduce(tensor: torch.Tensor, operation: torch.distributed.ReduceOp.RedOpType) -> None:
    import torch

    try:
        torch.distributed.all_reduce(tensor, operation)
    except RuntimeError as error:
        # Is it this rank's own device that failed, and not another rank's?
        if isinstance(error, torch.OutOfMemoryError) or not answers(tensor.device):
            raise
        raise PeerFailed from error
