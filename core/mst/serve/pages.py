"""Tensors in pages of their own: memory is taken by what is written, and is given back."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_OWN_PAGES = 1 << 16
_ALIGNED = 64


class Block:
    """A tensor of zeros.

    Zeros, because what is masked is multiplied by 0, and rubbish may be no number. On the host it
    lies in pages of its own, which take memory once something is written there, so that room to
    grow takes none; and freed ones go back to the system at once, where the heap would keep them.

    Attributes:
        tensor: all of it.
    """

    def __init__(self, like: torch.Tensor, shape: tuple[int, ...]) -> None:
        """Make one of a tensor's dtype and device."""
        import torch

        size = math.prod(shape) * like.element_size()
        self._pages: mmap.mmap | None = None
        if like.device.type != "cpu" or size < _OWN_PAGES:
            self.tensor = like.new_zeros(shape)
            return
        self._pages = _pages(size)
        self.tensor = torch.frombuffer(self._pages, dtype=like.dtype).view(shape)

    def clear(self, row: int) -> None:
        """Make a row zeros again, and give its pages back."""
        part = self.tensor[row].view(-1)
        first = row * part.nbytes
        begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (first + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # Elsewhere advised pages need not be zeros afterwards.
        if self._pages is None or end <= begin or sys.platform != "linux":
            part.zero_()
            return
        size = part.element_size()
        part[: (begin - first) // size].zero_()
        part[(end - first) // size :].zero_()
        self._pages.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def copies(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies of tensors, which take memory together and give it back together.

    One mapping for all: a process has a limited number of them.
    """
    import torch

    sizes = [-(-each.nbytes // _ALIGNED) * _ALIGNED for each in parts]
    if sum(sizes) < _OWN_PAGES or any(each.device.type != "cpu" for each in parts):
        return [each.clone(memory_format=torch.contiguous_format) for each in parts]
    pages, offset = _pages(sum(sizes)), 0
    found = []
    for each, size in zip(parts, sizes, strict=True):
        if each.numel():
            own = torch.frombuffer(pages, dtype=each.dtype, count=each.numel(), offset=offset)
            found.append(own.view(each.shape).copy_(each))
        else:
            found.append(each.clone())
        offset += size
    return found


def _pages(size: int) -> mmap.mmap:
    """Return so many bytes of memory.

    Raises:
        torch.OutOfMemoryError: the system has no more, as torch's own allocators say it.
    """
    try:
        if sys.platform != "linux":
            return mmap.mmap(-1, size)
        found = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        import torch

        raise torch.OutOfMemoryError(f"{size} bytes can't be mapped: {error.strerror}") from None
    # A huge page would take 2 MiB for the first column of a row. Not every kernel has them.
    with contextlib.suppress(OSError):
        found.madvise(mmap.MADV_NOHUGEPAGE)
    return found
