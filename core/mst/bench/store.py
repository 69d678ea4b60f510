"""The directory of a bench: cells are added as they are measured, and none is measured twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from mst import rundir, serial
from mst.bench.cells import Cell
from mst.bench.matrix import Matrix
from mst.bench.parity import with_parity
from mst.bench.result_file import SCHEMA, ResultsError, content_hash, measured_from, write_results
from mst.bench.results import ABSENT, BROKEN, Measured, Results
from mst.durable import write_text

MATRIX, MEASURED, RESULTS = "bench.json", "measured.jsonl", "results.json"


def claim(path: Path, matrix: Matrix) -> IO[str]:
    """Make or reopen the directory of a bench and return its lock, held.

    Raises:
        ResultsError: it holds something else, or can't be written.
        RunError: another mst is using it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(
            f"cannot make --output-dir {path}: {error.strerror}. Choose one that can be written."
        ) from None
    found = sorted(each.name for each in path.iterdir() if each.name != rundir.LOCK)
    if found and not (path / MATRIX).is_file():
        raise ResultsError(
            f"--output-dir {path} is not empty (it holds {found[0]}) and is no directory of mst"
            " bench. Pass a new or an empty one."
        )
    lock = rundir.take_lock(path)
    document = {"schema": SCHEMA, "matrix": asdict(matrix)}
    try:
        write_text(path / MATRIX, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        lock.close()
        raise ResultsError(f"cannot write in {path}: {error.strerror}.") from None
    return lock


def append(path: Path, each: Measured) -> None:
    """Add a cell; after a crash it is there whole, or not at all.

    Raises:
        ResultsError: it can't be written.
    """
    plain = serial.to_json(each)
    line = json.dumps({"sha256": content_hash(plain), "measured": plain}, ensure_ascii=False)
    try:
        with (path / MEASURED).open("ab+") as file:
            # What a crash has left of a line must not swallow this one.
            if file.tell() and not _ends_line(path / MEASURED):
                file.write(b"\n")
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ResultsError(
            f"cannot write {path / MEASURED}: {error.strerror}. Free some space, then give the"
            " same command again: what was measured is kept."
        ) from None


def _ends_line(file: Path) -> bool:
    with file.open("rb") as opened:
        opened.seek(-1, os.SEEK_END)
        return opened.read(1) == b"\n"


def read(path: Path) -> dict[str, Measured]:
    """Return the cells that were measured, by id; the newest of each.

    A line that was cut off by a crash is passed over, for its cell is measured again.

    Raises:
        ResultsError: a line was changed by hand.
    """
    found: dict[str, Measured] = {}
    try:
        lines = (path / MEASURED).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return found
    for number, line in enumerate(lines, 1):
        try:
            document = json.loads(line)
            plain = document["measured"]
        except (ValueError, LookupError, TypeError):
            continue
        if content_hash(plain) != document.get("sha256"):
            raise ResultsError(
                f"{path / MEASURED}, line {number} is not as `mst bench` wrote it. Remove the line"
                " to measure its cell again."
            )
        try:
            each = measured_from(plain)
        except ValueError:
            raise ResultsError(
                f"{path / MEASURED}, line {number} is of another version of mst. Pass a new"
                " --output-dir."
            ) from None
        found[each.id] = each
    return found


def left(cells: Sequence[Cell], known: Mapping[str, Measured], retry: bool) -> list[Cell]:
    """Return the cells that are still to be measured.

    Args:
        cells: of the matrix.
        known: what was measured.
        retry: cells that failed, hung or were lost are measured again; those without a device
            always are.
    """

    def wanted(cell: Cell) -> bool:
        each = known.get(cell.id)
        return each is None or each.status == ABSENT or (retry and each.status in BROKEN)

    return [each for each in cells if wanted(each)]


def finish(
    path: Path,
    matrix: Matrix,
    cells: Sequence[Cell],
    forecasts: Sequence[Measured],
    notes: Sequence[str],
) -> Results:
    """Write `results.json` of what there is, and return it."""
    known = read(path)
    found = [with_parity(known[each.id], known) for each in cells if each.id in known]
    results = Results(matrix.name, rundir.now(), (*found, *forecasts), tuple(notes))
    write_results(path / RESULTS, results)
    return results
