"""Small whole numbers in 32-bit words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pack(values: torch.Tensor, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Return values in 32-bit words along the last dimension, the first in the lowest bits.

    Args:
        values: whole numbers (..., n) below 2**bits; a word's share divides n.
        bits: a divisor of 32.
        order: which of a word's values comes first, second and so on; default as they stand.

    Returns:
        int32 (..., n * bits / 32).
    """
    import torch

    share = 32 // bits
    places = values.reshape(*values.shape[:-1], -1, share).long()
    words = torch.zeros(places.shape[:-1], dtype=torch.int64)
    for place, source in enumerate(order or range(share)):
        words |= places[..., source] << (place * bits)
    # The highest bit is the sign's: int32 holds 2**31 and more as negative numbers.
    return (words - ((words >> 31) << 32)).int()


def unpack(words: torch.Tensor, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Return what `pack` packed: uint8 (..., words * 32 / bits)."""
    import torch

    share = 32 // bits
    values = torch.empty((*words.shape, share), dtype=torch.uint8)
    for place, source in enumerate(order or range(share)):
        values[..., source] = ((words.long() >> (place * bits)) & (2**bits - 1)).byte()
    return values.reshape(*words.shape[:-1], -1)
