"""Rows into bins: first-fit decreasing, and shares of even size. Pure functions of the lengths."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def first_fit_decreasing(
    lengths: Sequence[int], capacity: int, order: Sequence[int] | None = None
) -> list[list[int]]:
    """Return bins of row indices, no bin longer than `capacity`.

    The longest row comes first; each goes into the first bin with room. A tournament tree over
    the room left finds it, so a million rows take seconds.

    Args:
        lengths: tokens of each row.
        capacity: most tokens of a bin; a row that is longer gets one of its own.
        order: the indices, in the order in which rows of one length are taken; default ascending.
            What the bins look like depends on the lengths alone; which of the rows of one length
            lies where depends on this.

    Source: Johnson et al. 1974, "Worst-Case Performance Bounds for Simple One-Dimensional Packing
        Algorithms": at most 11/9 of the fewest bins, and 4.
    """
    rows = range(len(lengths)) if order is None else order
    descending = sorted(rows, key=lambda row: -lengths[row])
    # First fit leaves at most one bin half empty, so there are never more than these.
    most = min(len(lengths), 2 * sum(lengths) // capacity + 1)
    leaves = 1 << max(0, most - 1).bit_length()
    room = [capacity] * (2 * leaves)
    bins: list[list[int]] = [[] for _ in range(leaves)]
    alone: list[list[int]] = []
    for row in descending:
        length = lengths[row]
        if length > capacity:
            alone.append([row])
            continue
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        bins[node - leaves].append(row)
        room[node] -= length
        while node > 1:
            node //= 2
            larger = max(room[2 * node], room[2 * node + 1])
            if room[node] == larger:
                break
            room[node] = larger
    return alone + [each for each in bins if each]


def even_shares(lengths: Sequence[int], most_rows: int) -> list[list[int]]:
    """Return as few shares of at most `most_rows` rows as can be, of nearly the same tokens.

    The longest row comes first; each goes to the share with the fewest tokens that has a place
    left. Indices ascend within a share.

    Source: Graham 1969, "Bounds on Multiprocessing Timing Anomalies" (longest processing time).
    """
    shares: list[list[int]] = [[] for _ in range(-(-len(lengths) // most_rows))]
    fewest = [(0, number) for number in range(len(shares))]
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        tokens, number = heapq.heappop(fewest)
        shares[number].append(row)
        if len(shares[number]) < most_rows:
            heapq.heappush(fewest, (tokens + lengths[row], number))
    return [sorted(each) for each in shares]


def by_length(lengths: Sequence[int], most_rows: int) -> list[list[int]]:
    """Return shares of `most_rows` rows of like lengths, the longest first: little is padded."""
    descending = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [descending[i : i + most_rows] for i in range(0, len(descending), most_rows)]
