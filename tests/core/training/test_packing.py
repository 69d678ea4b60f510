"""Rows into bins."""

from __future__ import annotations

import random
import time

from hypothesis import given
from hypothesis import strategies as st

from mst.training.packing import by_length, even_shares, first_fit_decreasing


def plain_first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return what the textbook says, in quadratic time."""
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        for rows in bins:
            if sum(lengths[each] for each in rows) + lengths[row] <= capacity:
                rows.append(row)
                break
        else:
            bins.append([row])
    return bins


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(100, 130))
def test_bins_are_those_of_the_textbook(lengths: list[int], capacity: int) -> None:
    found = first_fit_decreasing(lengths, capacity)

    assert found == plain_first_fit_decreasing(lengths, capacity)


@given(st.lists(st.integers(1, 300), max_size=60))
def test_a_row_that_is_longer_than_a_bin_lies_alone(lengths: list[int]) -> None:
    found = first_fit_decreasing(lengths, 100)

    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    for rows in found:
        assert len(rows) == 1 or sum(lengths[row] for row in rows) <= 100


def test_the_order_decides_which_of_the_rows_of_one_length_lie_where() -> None:
    assert first_fit_decreasing([50, 50, 50, 50], 100) == [[0, 1], [2, 3]]
    assert first_fit_decreasing([50, 50, 50, 50], 100, order=[3, 0, 2, 1]) == [[3, 0], [2, 1]]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 9))
def test_shares_hold_every_row_once(lengths: list[int], most: int) -> None:
    for share in (even_shares, by_length):
        found = share(lengths, most)

        assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
        assert len(found) == -(-len(lengths) // most)
        assert max(len(rows) for rows in found) <= most


def test_a_hundred_thousand_rows_are_packed_within_seconds() -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(10, 1000) for _ in range(100_000)]
    began = time.perf_counter()
    found = first_fit_decreasing(lengths, 2048)
    seconds = time.perf_counter() - began

    assert sum(lengths) / (2048 * len(found)) > 0.99
    assert seconds < 10
