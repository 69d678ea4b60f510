# ruff: noqa: TID253 -- imported by simchip.load() only, where torch is meant.
"""simccl, the chip's collectives: tensors go through the host, and gloo moves the bytes.

A collective is done when its function returns; its Work is a future that has its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future

Tensors = list[torch.Tensor]
_corrupt: list[bool] = [False]


def register(device: str, name: str = "simccl") -> None:
    """Make the collectives known to torch.distributed as `name`, for tensors on `device`."""
    if dist.is_available() and name.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(name, _creator(name), devices=[device])


def set_corrupt(corrupt: bool) -> None:
    """Choose whether each reduction ends in a wrong first element, on chips only."""
    _corrupt[0] = corrupt


def _creator(name: str) -> Callable[..., SimCCL]:
    def create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> SimCCL:
        gloo = dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, size, timeout)
        return SimCCL(name, rank, size, gloo)

    return create


def _finished(result: object) -> dist.Work:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)


def _host(tensors: Sequence[torch.Tensor]) -> Tensors:
    return [each.detach().cpu().contiguous() for each in tensors]


def _back(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        if target.data_ptr() != source.data_ptr():
            target.detach().copy_(source)


def _reduce_op(options: Any) -> tuple[Any, bool]:
    """Return the reduction that gloo knows, and whether to divide by the number of ranks."""
    average = options.reduceOp == dist.ReduceOp.AVG
    return (dist.ReduceOp.SUM if average else options.reduceOp), average


class SimCCL(dist.ProcessGroup):
    """A process group of simulated chips. Takes tensors of the host as well."""

    def __init__(self, name: str, rank: int, size: int, gloo: dist.ProcessGroupGloo) -> None:
        super().__init__(rank, size)
        self._name, self._gloo = name, gloo

    def getBackendName(self) -> str:
        return self._name

    def allreduce(self, tensors: Tensors, opts: Any = None) -> dist.Work:
        host, options = _host(tensors), dist.AllreduceOptions()
        options.reduceOp, average = _reduce_op(opts or options)
        self._gloo.allreduce(host, options).wait()
        return self._reduced(tensors, host, average)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> dist.Work:
        for each in tensors:
            self.allreduce([each], opts)
        return _finished(tensors)

    def reduce(self, tensors: Tensors, opts: Any) -> dist.Work:
        host, options = _host(tensors), dist.ReduceOptions()
        options.reduceOp, average = _reduce_op(opts)
        options.rootRank = opts.rootRank
        self._gloo.reduce(host, options).wait()
        # Only the root's tensor holds the sum; gloo leaves intermediate ones with the others.
        if self.rank() != opts.rootRank:
            return _finished(tensors)
        return self._reduced(tensors, host, average)

    def reduce_scatter(
        self, output_tensors: Tensors, input_tensors: list[Tensors], opts: Any = None
    ) -> dist.Work:
        options = opts or dist.ReduceScatterOptions()
        for output, parts in zip(output_tensors, input_tensors, strict=True):
            self._reduce_scatter(output, torch.stack(_host(parts)), options)
        return _finished(output_tensors)

    def _reduce_scatter_base(
        self, output: torch.Tensor, input: torch.Tensor, opts: Any = None
    ) -> dist.Work:
        whole = _host([input])[0].view(self.size(), -1)
        self._reduce_scatter(output, whole, opts or dist.ReduceScatterOptions())
        return _finished([output])

    # The name since torch 2.13.
    reduce_scatter_single = _reduce_scatter_base

    def broadcast(self, tensors: Tensors, opts: Any) -> dist.Work:
        host = _host(tensors)
        self._gloo.broadcast(host, opts).wait()
        _back(tensors, host)
        return _finished(tensors)

    def allgather(
        self, output_tensors: list[Tensors], input_tensors: Tensors, opts: Any = None
    ) -> dist.Work:
        host = [[torch.empty_like(each, device="cpu") for each in row] for row in output_tensors]
        self._gloo.allgather(host, _host(input_tensors)).wait()
        for row, received in zip(output_tensors, host, strict=True):
            _back(row, received)
        return _finished(output_tensors)

    def _allgather_base(
        self, output: torch.Tensor, input: torch.Tensor, opts: Any = None
    ) -> dist.Work:
        parts = list(output.view(self.size(), *input.shape).unbind())
        self.allgather([parts], [input])
        return _finished([output])

    # The name since torch 2.13.
    all_gather_single = _allgather_base

    def gather(self, output_tensors: list[Tensors], input_tensors: Tensors, opts: Any) -> dist.Work:
        host = [[torch.empty_like(each, device="cpu") for each in row] for row in output_tensors]
        self._gloo.gather(host, _host(input_tensors), opts).wait()
        for row, received in zip(output_tensors, host, strict=True):
            _back(row, received)
        return _finished(output_tensors)

    def scatter(
        self, output_tensors: Tensors, input_tensors: list[Tensors], opts: Any
    ) -> dist.Work:
        host = [torch.empty_like(each, device="cpu") for each in output_tensors]
        self._gloo.scatter(host, [_host(row) for row in input_tensors], opts).wait()
        _back(output_tensors, host)
        return _finished(output_tensors)

    def send(self, tensors: Tensors, dstRank: int, tag: int) -> dist.Work:
        self._gloo.send(_host(tensors), dstRank, tag).wait()
        return _finished(tensors)

    def recv(self, tensors: Tensors, srcRank: int, tag: int) -> dist.Work:
        host = [torch.empty_like(each, device="cpu") for each in tensors]
        self._gloo.recv(host, srcRank, tag).wait()
        _back(tensors, host)
        return _finished(tensors)

    def barrier(self, opts: Any = None) -> dist.Work:
        self._gloo.barrier().wait()
        return _finished([])

    def _reduced(self, tensors: Tensors, host: Tensors, average: bool) -> dist.Work:
        if average:
            for each in host:
                each.div_(self.size())
        _back(tensors, host)
        if _corrupt[0]:
            for each in tensors:
                if each.device.type != "cpu" and each.numel():
                    each.detach().view(-1)[:1].add_(1)
        return _finished(tensors)

    def _reduce_scatter(self, output: torch.Tensor, whole: torch.Tensor, opts: Any) -> None:
        """Reduce all rows and keep this rank's: gloo's own reduce_scatter is recent."""
        options = dist.AllreduceOptions()
        options.reduceOp, average = _reduce_op(opts)
        self._gloo.allreduce([whole], options).wait()
        self._reduced([output], [whole[self.rank()].view(output.shape)], average)
