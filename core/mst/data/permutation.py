"""An order of any number of rows that is computed place by place, and takes no memory."""

from __future__ import annotations

import hashlib

_ROUNDS = 4


def permuted(place: int, count: int, key: str) -> int:
    """Return which of `count` rows comes at `place` in the order that `key` names.

    A Feistel network shuffles the numbers of an even count of bits; what lies beyond `count` is
    shuffled on until it does not. Every machine and Python version gets the same order.

    Source: Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 4 (cycle walking)
        and 5 (Feistel); Luby & Rackoff 1988 for four rounds.
    """
    half = max(1, -(-(count - 1).bit_length() // 2))
    mask = (1 << half) - 1
    secret = hashlib.blake2b(key.encode(), digest_size=32).digest()
    while True:
        left, right = place >> half, place & mask
        for turn in range(_ROUNDS):
            drawn = hashlib.blake2b(
                right.to_bytes(8, "little"), digest_size=8, key=secret, salt=bytes([turn])
            )
            left, right = right, left ^ int.from_bytes(drawn.digest(), "little") & mask
        place = left << half | right
        if place < count:
            return place
