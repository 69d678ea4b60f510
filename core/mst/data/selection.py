"""Which rows of a source are taken: `path#1000` the first, `path#~1000` a sample."""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
_SPELLING = re.compile(r"(?P<path>.+)#(?P<sampled>~?)(?P<rows>[1-9][0-9]*)")


@dataclass(frozen=True)
class Selection:
    """Rows taken of a source.

    Attributes:
        rows: at most so many; None for all.
        sampled: drawn by the seed over all of the source's files, instead of the first.
    """

    rows: int | None = None
    sampled: bool = False

    def __str__(self) -> str:
        """Return it as a person reads it, "" for all rows."""
        if self.rows is None:
            return ""
        return f"{'a sample of' if self.sampled else 'the first'} {self.rows}"


def split_spec(spec: str) -> tuple[str, Selection]:
    """Return a source's path and its selection: "a.csv#~9" draws 9 rows of a.csv."""
    found = _SPELLING.fullmatch(spec)
    if found is None:
        return spec, Selection()
    return found["path"], Selection(int(found["rows"]), bool(found["sampled"]))


def select(rows: Iterable[T], selection: Selection, seed: int) -> Iterator[T]:
    """Yield the chosen rows in their order, holding no more than those.

    Rows are drawn by a hash of seed and index, as `mst.data.split` does: the same under every
    version of Python.
    """
    if selection.rows is None:
        yield from rows
    elif not selection.sampled:
        yield from islice(rows, selection.rows)
    else:
        keyed = ((_key(seed, index), index, row) for index, row in enumerate(rows))
        drawn = heapq.nsmallest(selection.rows, keyed, key=lambda each: each[:2])
        yield from (row for _, _, row in sorted(drawn, key=lambda each: each[1]))


def _key(seed: int, index: int) -> bytes:
    # Another text than the split's, or the sample would hold the very rows that are held out first.
    return hashlib.sha256(f"sample:{seed}:{index}".encode()).digest()
