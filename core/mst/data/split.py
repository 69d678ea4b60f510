"""Which rows are held out."""

from __future__ import annotations

import hashlib
import math

from mst.errors import DataError


def split(n_rows: int, val_size: float, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose the rows that are trained on and those that are held out.

    Args:
        n_rows: rows in the data set.
        val_size: below 1 a fraction of the rows (at least one row), from 1 on their number;
            0 holds none out.
        seed: another seed holds out other rows.

    Returns:
        Indices of training rows and of held-out rows, each ascending.

    Raises:
        DataError: when `val_size` is no such number or leaves no row to train on.
    """
    held_out = held_out_rows(n_rows, val_size)
    if held_out >= n_rows:
        raise DataError(
            f"--val-size {val_size:g} holds out {held_out} of {n_rows} rows, which leaves none to "
            "train on. Pass a smaller --val-size, or 0 for none."
        )
    # Ordered by a hash and not by random.shuffle, whose algorithm Python may change: a run that is
    # resumed under another version must hold out the same rows.
    order = sorted(range(n_rows), key=lambda index: _key(seed, index))
    return tuple(sorted(order[held_out:])), tuple(sorted(order[:held_out]))


def held_out_rows(n_rows: int, val_size: float) -> int:
    """Return how many of `n_rows` rows `--val-size` holds out; raises as `split` does."""
    # math.isfinite first: int() of nan or infinity raises.
    if not math.isfinite(val_size) or val_size < 0 or (val_size >= 1 and val_size % 1):
        raise DataError(
            f"--val-size {val_size:g} is neither a fraction below 1 nor a whole number of rows. "
            "Pass for example 0.1, 200, or 0 for none."
        )
    if val_size >= 1:
        return int(val_size)
    return max(1, round(n_rows * val_size)) if val_size else 0


def _key(seed: int, index: int) -> bytes:
    return hashlib.sha256(f"{seed}:{index}".encode()).digest()
