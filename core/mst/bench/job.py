"""A bench from its matrix to its results: cell by cell on this machine, or spread by Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mst.bench import store
from mst.bench.cells import Cell, cells_of
from mst.bench.matrix import Matrix
from mst.bench.peak import remembered_peaks
from mst.bench.results import Measured, Results
from mst.bench.run_cell import Place, run_cell
from mst.probe import machine_facts
from mst.registry import load

# The stage of a cell that was handed to a cluster.
WAITING = "waiting for a node, or on one"


@dataclass(frozen=True)
class Wish:
    """How a bench is to be run.

    Attributes:
        matrix: what is measured.
        directory: takes the results.
        environ: of what is started.
        seal: options of the jail and the audit log, for every command.
        retry: cells that failed are measured again.
        keep_runs: run directories are not removed.
        seconds: after which no further repeat, export or server is begun; None for no end.
        predict: hardware to forecast the cells for, as `mst plan --on` takes it.
        ray: "" for this machine alone, "auto", or the address of a Ray cluster.
        peers: the interpreter of each peer that trains the cells too.
    """

    matrix: Matrix
    directory: Path
    environ: Mapping[str, str]
    seal: tuple[str, ...] = ()
    retry: bool = False
    keep_runs: bool = False
    seconds: float | None = None
    predict: tuple[str, ...] = ()
    ray: str = ""
    peers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Events:
    """Who is told of what goes on.

    Attributes:
        planned: all cells, and how many of them were measured before.
        stage: a cell, and what is done with it.
        measured: what came of a cell.
    """

    planned: Callable[[Sequence[Cell], Sequence[Measured]], None] = lambda cells, known: None
    stage: Callable[[Cell, str], None] = lambda cell, stage: None
    measured: Callable[[Measured], None] = lambda each: None


def bench(wish: Wish, events: Events) -> Results:
    """Measure what is left of a matrix, and return all that there is of it.

    Interrupted, it leaves the results so far; the same command goes on.

    Raises:
        MstError: the directory, the cluster or a forecast stands in the way.
    """
    cells = cells_of(wish.matrix, wish.peers)
    if wish.ray:
        from mst.bench.ray_cluster import kind_of

        for cell in cells:  # before anything is claimed
            kind_of(cell)
    with store.claim(wish.directory, wish.matrix):
        known = store.read(wish.directory)
        to_do = store.left(cells, known, wish.retry)
        undone = {each.id for each in to_do}
        events.planned(cells, [known[each.id] for each in cells if each.id not in undone])
        notes: list[str] = []
        try:
            for each in _measurements(wish, to_do, events, notes):
                store.append(wish.directory, each)
                events.measured(each)
        finally:
            # Also when it was interrupted; then what stopped it is what is told.
            results = store.finish(wish.directory, wish.matrix, cells, (), notes)
            with suppress(OSError):
                (wish.directory / "cells").rmdir()
        if wish.predict:
            from mst.bench.predict import forecasts

            made = forecasts(cells_of(wish.matrix), wish.predict, wish.environ)
            results = store.finish(wish.directory, wish.matrix, cells, made, notes)
    return results


def _measurements(
    wish: Wish, to_do: Sequence[Cell], events: Events, notes: list[str]
) -> Iterator[Measured]:
    if wish.ray:
        from mst.bench.ray_cluster import on_cluster

        yield from on_cluster(wish, to_do, events.stage, notes)
        return
    yield from here(wish, to_do, events.stage)


def here(
    wish: Wish, to_do: Sequence[Cell], stage: Callable[[Cell, str], None]
) -> Iterator[Measured]:
    """Yield what came of each cell on this machine, one after the other."""
    if not to_do:
        return
    registry = load()
    place = Place(
        directory=wish.directory,
        machine=machine_facts(registry),
        registry=registry,
        environ=wish.environ,
        seal=wish.seal,
        peak_of=remembered_peaks(wish.directory, wish.environ, wish.seal),
        keep_runs=wish.keep_runs,
        peers=wish.peers,
        until=None if wish.seconds is None else time.monotonic() + wish.seconds,
    )
    for cell in to_do:
        yield run_cell(cell, place, partial(stage, cell))
