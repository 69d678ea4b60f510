"""Curves as they grow: of a metrics file only what is new is read, and few points are sent."""

from __future__ import annotations

import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mst import rundir
from mst.ui.index import figures

# Runs whose curves are kept; ten figures of 10,000 steps are 1.6 MB.
_KEPT = 16
# Read at once; what a cap on lines would cut is damaged anyway.
_BLOCK = 8 << 20
_NO_CURVES = frozenset({"step", "epoch", "tokens"})

# Steps and values of a figure, two lists of one length.
Points = tuple[list[int], list[float]]


@dataclass
class Series:
    """One figure over the steps."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))


@dataclass(frozen=True)
class Grown:
    """What has come to a curve.

    Attributes:
        generation: changes when the file was written anew, as on resuming; what was shown before
            is to be forgotten then.
        damaged: lines that could not be read, or went back in their steps.
        points: new ones, by the figure's name.
        sizes: how many points each figure had when this was told.
    """

    generation: int
    damaged: int
    points: dict[str, Points]
    sizes: dict[str, int]


class Tail:
    """The metrics of one run, read as far as they are whole."""

    def __init__(self, run: Path) -> None:
        """Nothing is read yet."""
        self._path = run / rundir.METRICS
        self._inode = -1
        self._offset = 0
        self.generation = 0
        self.damaged = 0
        self.series: dict[str, Series] = {}
        self._lock = threading.Lock()

    def read(self) -> None:
        """Read what was written since the last time; a file that is gone keeps what was read."""
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    found = os.fstat(file.fileno())
                    if found.st_ino != self._inode or found.st_size < self._offset:
                        self._begin(found.st_ino)
                    file.seek(self._offset)
                    while block := file.read(_BLOCK):
                        if not self._take(block):
                            break
                        file.seek(self._offset)
            except OSError:
                return

    def _begin(self, inode: int) -> None:
        self._inode, self._offset, self.damaged = inode, 0, 0
        self.series = {}
        self.generation += 1

    def _take(self, block: bytes) -> bool:
        """Take the whole lines of a block; return whether there may be more."""
        end = block.rfind(b"\n") + 1
        if end == 0 and len(block) == _BLOCK:
            # No line is so long: it is passed over.
            self._offset += len(block)
            self.damaged += 1
            return True
        self._offset += end
        for line in block[:end].splitlines():
            self._line(line)
        return len(block) == _BLOCK

    def _line(self, line: bytes) -> None:
        found = figures(line)
        if found is None:
            self.damaged += 1
            return
        step = int(found["step"])
        for name, value in found.items():
            if name in _NO_CURVES:
                continue
            series = self.series.setdefault(name, Series())
            if series.steps and step < series.steps[-1]:
                self.damaged += 1
                return
            series.steps.append(step)
            series.values.append(value)

    def whole(self, most: int) -> Grown:
        """Return all curves, thinned to at most `most` points each."""
        with self._lock:
            return self._grown({}, most)

    def since(self, told: Grown, most: int) -> Grown:
        """Return what has come since, each curve thinned; all of it where the file is another.

        Args:
            told: what was told before.
            most: points a figure.
        """
        with self._lock:
            return self._grown(told.sizes if told.generation == self.generation else {}, most)

    def _grown(self, begins: Mapping[str, int], most: int) -> Grown:
        points = {}
        for name, each in self.series.items():
            begin = begins.get(name, 0)
            if begin < len(each.steps):
                new = Series(each.steps[begin:], each.values[begin:]) if begin else each
                points[name] = thinned(new, most)
        sizes = {name: len(each.steps) for name, each in self.series.items()}
        return Grown(self.generation, self.damaged, points, sizes)


def thinned(series: Series, most: int) -> Points:
    """Return at most `most` points: of each stretch of steps the lowest and the highest.

    So no spike is lost, as it would be with means; the first and the last point are kept too.
    """
    count = len(series.steps)
    if count <= most:
        return list(series.steps), list(series.values)
    stretches = max(1, (most - 2) // 2)
    kept = {0, count - 1}
    for number in range(stretches):
        begin, end = number * count // stretches, (number + 1) * count // stretches
        values = series.values[begin:end]
        kept.add(begin + values.index(min(values)))
        kept.add(begin + values.index(max(values)))
    places = sorted(kept)
    return [series.steps[each] for each in places], [series.values[each] for each in places]


class Tails:
    """The curves that are looked at; the ones that nobody has asked for longest are forgotten."""

    def __init__(self) -> None:
        """Keep none yet."""
        self._kept: OrderedDict[Path, Tail] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, run: Path) -> Tail:
        """Return the curves of a run, which are read by whoever asks."""
        with self._lock:
            found = self._kept.setdefault(run, Tail(run))
            self._kept.move_to_end(run)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return found
