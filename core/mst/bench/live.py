"""What is shown while a bench runs: the cells so far, what is under way, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mst.bench.cells import Cell
from mst.bench.job import WAITING, Events
from mst.bench.results import Measured
from mst.quantities import duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# So many of the newest cells stay in sight.
_SHOWN = 12
_WAYS_A_SECOND = 4


class Progress:
    """How far a bench is, told by its events."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing."""
        self._clock = clock
        self._began = clock()
        self.total = 0
        self.before = 0
        self.cells: list[Measured] = []
        self.stages: dict[str, tuple[Cell, str]] = {}

    def planned(self, cells: Sequence[Cell], known: Sequence[Measured]) -> None:
        """Note all cells, and those that were measured before."""
        self.total, self.before = len(cells), len(known)
        self._began = self._clock()

    def stage(self, cell: Cell, words: str) -> None:
        """Note what is done with a cell."""
        self.stages[cell.id] = (cell, words)

    def measured(self, each: Measured) -> None:
        """Note what came of a cell."""
        self.stages.pop(each.id, None)
        self.cells.append(each)

    def seconds_left(self) -> float | None:
        """Return how long the rest will take, as the cells so far did; None before the first.

        Cells that are under way count as half done; which of those that Ray has been given are, it
        does not say, so these don't count.
        """
        if not self.cells:
            return None
        begun = sum(words != WAITING for _, words in self.stages.values())
        done = len(self.cells) + begun / 2
        rest = self.total - self.before - done
        return max(0.0, (self._clock() - self._began) / done * rest)

    def line(self) -> str:
        """Return it in one line."""
        left = self.seconds_left()
        done = self.before + len(self.cells)
        words = f"{done} of {self.total} cells"
        return f"{words}, about {duration(left)} left" if left else words


@contextmanager
def shown(console: Console) -> Iterator[Events]:
    """Show a bench's events until left: a live table on a terminal, a line a cell elsewhere."""
    from mst.bench.table import show_cell

    progress = Progress()
    if not console.is_terminal:

        def told(each: Measured) -> None:
            progress.measured(each)
            show_cell(console, each)
            console.print(progress.line())

        yield Events(progress.planned, progress.stage, told)
        return
    from rich.live import Live

    with Live(
        get_renderable=lambda: _picture(progress),
        console=console,
        refresh_per_second=_WAYS_A_SECOND,
        transient=True,
    ):
        yield Events(progress.planned, progress.stage, progress.measured)


def words_of(cell: Cell) -> str:
    """Return a cell that is under way in a few words."""
    who = f", {cell.peer}" if cell.peer else ""
    return f"{cell.model}, {cell.method}, {cell.length}, {cell.batch}, {cell.device}{who}"


def _picture(progress: Progress) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from mst.bench.table import cell_table

    under_way = [
        Text(f"… {words_of(cell)}: {words}")
        # Copied at once: with Ray, stages change while this is drawn.
        for cell, words in list(progress.stages.values())
    ]
    table = cell_table(progress.cells[-_SHOWN:])
    return Group(table, *under_way, Text(progress.line()))
