from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mst.data.split import split
from mst.errors import DataError


def test_the_held_out_rows_are_the_same_on_every_machine() -> None:
    assert split(10, 0.3, 0)[1] == (4, 7, 9)
    assert split(10, 3, 0) == split(10, 0.3, 0)
    assert split(10, 0.3, 1)[1] != split(10, 0.3, 0)[1]


@given(st.integers(2, 500), st.floats(0, 0.9), st.integers(0, 2**40))
def test_every_row_is_on_one_side(n_rows: int, val_size: float, seed: int) -> None:
    try:
        train, val = split(n_rows, val_size, seed)
    except DataError:
        assert round(n_rows * val_size) >= n_rows
        return

    assert sorted(train + val) == list(range(n_rows))
    assert list(train) == sorted(train)
    assert bool(val) == bool(val_size)
    assert train


def test_nothing_is_held_out_on_request() -> None:
    assert split(3, 0, 0) == ((0, 1, 2), ())


@pytest.mark.parametrize(("n_rows", "val_size"), [(1, 0.1), (3, 3), (3, 4), (2, 0.9), (0, 0)])
def test_training_is_never_left_empty(n_rows: int, val_size: float) -> None:
    with pytest.raises(DataError, match=r"--val-size .* leaves none to train on"):
        split(n_rows, val_size, 0)


@pytest.mark.parametrize("val_size", [-1, 1.5, math.nan, math.inf])
def test_a_size_that_is_none_is_refused(val_size: float) -> None:
    with pytest.raises(DataError, match="neither a fraction"):
        split(10, val_size, 0)
