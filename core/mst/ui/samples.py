"""Sample answers of a run, where they are switched on: files of `mst eval --predictions` in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mst import rundir

_MOST_ROWS = 20
_MOST_CHARACTERS = 2000
_MOST_LINE = 1 << 20
_FIELDS = ("reference", "prediction", "compared_prediction")


def samples(run: Path) -> list[dict[str, Any]]:
    """Return the first rows of each file of answers in a run's directory, cut to what is read."""
    found = []
    for file in sorted(run.glob("*.jsonl")):
        if file.name == rundir.METRICS or file.is_symlink():
            continue
        rows = list(islice(_rows(file), _MOST_ROWS))
        if rows:
            found.append({"file": file.name, "rows": rows})
    return found


def _rows(file: Path) -> Iterator[dict[str, str]]:
    try:
        with file.open("rb") as lines:
            while line := lines.readline(_MOST_LINE):
                row = _row(line)
                if row is None:
                    return
                yield row
    except OSError:
        return


def _row(line: bytes) -> dict[str, str] | None:
    """Return a line of answers; None for a line of something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not {"reference", "prediction"} <= value.keys():
        return None
    return {name: str(value[name])[:_MOST_CHARACTERS] for name in _FIELDS if name in value}
