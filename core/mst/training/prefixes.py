"""Which sequences begin alike, and by how many tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from array import array

# Shorter beginnings are a template's first marks, and spare nothing to speak of.
LEAST_SHARED = 8


@dataclass(frozen=True)
class Beginnings:
    """Which sequences begin alike: a trie of which only the branches are kept.

    Attributes:
        places: of each sequence in lexicographic order.
        nodes: of each sequence, its deepest branch; -1 for none.
        parents: of each branch, the next one towards the root; -1 for none.
        depths: of each branch, how many tokens come before it; at least `LEAST_SHARED`.
    """

    places: tuple[int, ...] = field(repr=False)
    nodes: tuple[int, ...] = field(repr=False)
    parents: tuple[int, ...] = field(repr=False)
    depths: tuple[int, ...] = field(repr=False)


def common_length(one: array[int], other: array[int]) -> int:
    """Return how many tokens two sequences begin with alike.

    By halving, as arrays compare their slices at memory speed.
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def beginnings(sequences: Sequence[array[int]]) -> Beginnings:
    """Return which of some sequences begin alike.

    In lexicographic order, two sequences have in common what all neighbours between them have.

    Source: Abouelhoda, Kurtz and Ohlebusch 2004, "Replacing suffix trees with enhanced suffix
        arrays", section 4.1: the tree of intervals of common prefixes, with one stack.
    """
    ordered = sorted(range(len(sequences)), key=sequences.__getitem__)
    places, nodes = [0] * len(sequences), [-1] * len(sequences)
    parents: list[int] = []
    depths: list[int] = []
    stack: list[int] = []
    before = -1
    for place, number in enumerate(ordered):
        places[number] = place
        depth = 0
        if before >= 0:
            depth = common_length(sequences[before], sequences[number])
        if depth < LEAST_SHARED:
            stack.clear()
        else:
            below = -1
            while stack and depths[stack[-1]] > depth:
                below = stack.pop()
            if not stack or depths[stack[-1]] < depth:
                parents.append(stack[-1] if stack else -1)
                depths.append(depth)
                stack.append(len(depths) - 1)
                if below >= 0:
                    parents[below] = stack[-1]
                else:
                    nodes[before] = stack[-1]
            nodes[number] = stack[-1]
        before = number
    return Beginnings(tuple(places), tuple(nodes), tuple(parents), tuple(depths))


def shared_tokens(known: Beginnings, one: int, other: int) -> int:
    """Return how many tokens two sequences begin with alike; 0 where they are too few."""
    a, b = known.nodes[one], known.nodes[other]
    while a != b:
        if min(a, b) < 0:
            return 0
        if known.depths[a] >= known.depths[b]:
            a = known.parents[a]
        else:
            b = known.parents[b]
    return known.depths[a] if a >= 0 else 0


def in_order(
    numbers: Iterable[int], lengths: Sequence[int], known: Beginnings
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return sequences in lexicographic order, and what each has from the one before it."""
    ordered = sorted(numbers, key=known.places.__getitem__)
    joins = [0]
    for one, other in pairwise(ordered):
        # Rows may have been cut since.
        found = min(shared_tokens(known, one, other), lengths[one], lengths[other])
        joins.append(found if found >= LEAST_SHARED else 0)
    return tuple(ordered), tuple(joins)
