"""What is alive: the bytes of every tensor's storage, as a caching allocator would count them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# torch's caching allocators hand out multiples of this (c10/core/AllocatorConfig.h, kMinBlockSize).
BLOCK_BYTES = 512


class LiveStorages:
    """Counts storages from the first tensor over them until the last one dies.

    Attributes:
        bytes: alive at the moment.
        peak: the most since `restart`.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.bytes = 0
        self.peak = 0
        self._known: dict[int, object] = {}

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.bytes

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def gone() -> None:
            if self._known.pop(key, None) is not None:
                self.bytes -= size

        self._known[key] = weakref.finalize(storage, gone)


@contextlib.contextmanager
def counted(live: LiveStorages) -> Iterator[None]:
    """Count what every operator within makes, real or without data."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            for each in tree_iter(result):
                if isinstance(each, torch.Tensor):
                    live.add(each)
            return result

    with Counting():  # type: ignore[no-untyped-call]
        yield
