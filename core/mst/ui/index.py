"""The runs under the directories that the user named: each by an id, read again when it changes."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mst import rundir
from mst.errors import MstError
from mst.last_lines import last_lines
from mst.rundir import RunManifest
from mst.runs import RunSummary

# A list that is younger is not made again, however many pages ask.
_FRESH_SECONDS = 1.0
# Of the metrics' end, where the newest losses stand.
_TAIL_BYTES = 4096

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Entry:
    """A run in the list.

    Attributes:
        id: by which the page asks for it; says nothing of its path.
        path: of its directory.
        place: which of the directories that were named it lies in, from 0.
        manifest: stamp of the manifest that `summary` was made from; None without one.
        metrics: stamp of the metrics.
        summary: as `mst runs list` has it, but `loss` is that of the newest step.
        finished: UTC, ISO 8601.
    """

    id: str
    path: Path
    place: int
    manifest: Stamp | None
    metrics: Stamp | None
    summary: RunSummary
    finished: str | None = None


def id_of(path: Path) -> str:
    """Return by what the page calls a run: a hash of its place."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:24]


class Index:
    """The runs, newest first. Its methods may be called from any thread."""

    def __init__(self, places: Sequence[Path]) -> None:
        """List the runs in these directories, which are absolute and need not be there yet."""
        self.places = tuple(places)
        self._entries: dict[str, Entry] = {}
        self._order: tuple[Entry, ...] = ()
        self._looked = 0.0
        self._lock = threading.Lock()

    def entries(self) -> tuple[Entry, ...]:
        """Return the runs that are there, newest first."""
        with self._lock:
            if time.monotonic() - self._looked >= _FRESH_SECONDS or not self._looked:
                self._entries = {each.id: each for each in self._look()}
                self._order = tuple(
                    sorted(
                        self._entries.values(),
                        key=lambda each: (each.summary.created or "", each.summary.name),
                        reverse=True,
                    )
                )
                self._looked = time.monotonic()
            return self._order

    def find(self, name: str) -> Entry | None:
        """Return the run with this id as it is at this moment; None where none is."""
        with self._lock:
            known = self._entries.get(name)
        if known is None:
            self.entries()
            with self._lock:
                known = self._entries.get(name)
        if known is None or not _is_run(known.path, self.places[known.place]):
            return None
        found = _entry(known.path, known.place, known)
        with self._lock:
            # What was read is not read again, also where nobody asks for the list.
            self._entries[name] = found
        return found

    def _look(self) -> Iterator[Entry]:
        for number, place in enumerate(self.places):
            try:
                found = sorted(os.scandir(place), key=lambda each: each.name)
            except OSError:
                continue
            for each in found:
                path = place / each.name
                if each.name[0] != "." and _is_run(path, place):
                    yield _entry(path, number, self._entries.get(id_of(path)))


def _is_run(path: Path, place: Path) -> bool:
    """Return whether a run lies there, and not elsewhere behind a link."""
    # Not Path.is_file, which raises where a directory is somebody else's alone.
    manifest = path / rundir.MANIFEST
    return path.parent == place and not os.path.islink(path) and os.path.isfile(manifest)


def _entry(path: Path, place: int, known: Entry | None) -> Entry:
    manifest, metrics = _stamp(path / rundir.MANIFEST), _stamp(path / rundir.METRICS)
    if known is None or known.manifest != manifest:
        known = _read(path, place, manifest)
    if known.metrics != metrics:
        summary = known.summary
        newest = newest_figures(path)
        steps = newest.get("step", summary.steps)
        summary = replace(
            summary,
            steps=None if steps is None else int(steps),
            loss=newest.get("loss"),
            eval_loss=newest.get("eval_loss", summary.eval_loss),
        )
        if summary.state != "done":
            summary = replace(summary, tokens_per_second=newest.get("tokens_per_second"))
        known = replace(known, metrics=metrics, summary=summary)
    if known.summary.state in ("running", "killed"):
        # Nobody writes into the manifest when a run is killed; its lock tells.
        state = "running" if rundir.is_locked(path) else "killed"
        known = replace(known, summary=replace(known.summary, state=state))
    return known


def _read(path: Path, place: int, stamp: Stamp | None) -> Entry:
    name, key = path.name, id_of(path)
    try:
        manifest = rundir.read_manifest(path)
    except (MstError, OSError) as error:
        damaged = RunSummary(name, str(path), "damaged", str(error))
        return Entry(key, path, place, stamp, None, damaged)
    results = finite_results(manifest)
    steps = results.get("steps")
    summary = RunSummary(
        name=name,
        path=str(path),
        state=manifest.status,
        problem=manifest.error,
        model=manifest.model,
        created=manifest.created,
        steps=None if steps is None else int(steps),
        eval_loss=results.get("last_eval_loss"),
        accuracy=results.get("accuracy_after_restricted"),
        tokens_per_second=results.get("tokens_per_second"),
    )
    return Entry(key, path, place, stamp, None, summary, manifest.finished)


def finite_results(manifest: RunManifest) -> dict[str, float | None]:
    """Return a run's results as JSON can hold them."""
    return {name: finite(each) for name, each in manifest.results.items()}


def finite(value: Any) -> float | None:
    """Return a number that JSON can hold; None for none, and for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e300 else None


def newest_figures(path: Path) -> dict[str, float]:
    """Return the newest figure of each name in the last few lines of a run's metrics."""
    try:
        lines = last_lines(path / rundir.METRICS, _TAIL_BYTES).split(b"\n")
    except OSError:
        return {}
    found: dict[str, float] = {}
    # What follows the last end of a line may be half a line.
    for line in lines[:-1]:
        found |= figures(line) or {}
    return found


def figures(line: bytes) -> dict[str, float] | None:
    """Return the finite numbers in a line of metrics by their names; None for a damaged line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    found = {name: number for name, each in value.items() if (number := finite(each)) is not None}
    step = found.get("step")
    return found if step is not None and step >= 0 and step == int(step) else None


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
