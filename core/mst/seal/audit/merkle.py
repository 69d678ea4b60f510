"""The Merkle tree hash over a log that grows, from the roots of its whole subtrees alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def leaf(line: bytes) -> bytes:
    """Return the hash of one entry.

    Source: RFC 6962, section 2.1: MTH({d}) = SHA-256(0x00 || d).
    """
    return hashlib.sha256(b"\x00" + line).digest()


def extend(frontier: list[bytes], size: int, entry: bytes) -> None:
    """Add one entry's hash to a tree, in place.

    Args:
        frontier: roots of the whole subtrees of `size` leaves, the largest first: one for each bit
            that is set in `size`.
        size: leaves before.
        entry: from `leaf`.
    """
    while size & 1:
        entry = _node(frontier.pop(), entry)
        size >>= 1
    frontier.append(entry)


def root(frontier: Sequence[bytes]) -> bytes:
    """Return the hash of the whole tree.

    Source: RFC 6962, section 2.1: MTH(D[n]) = SHA-256(0x01 || MTH(D[0:k]) || MTH(D[k:n])), with k
    the largest power of two below n; the frontier is where these cuts fall.
    """
    if not frontier:
        return hashlib.sha256(b"").digest()
    found = frontier[-1]
    for each in reversed(frontier[:-1]):
        found = _node(each, found)
    return found


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
