"""The file that holds what a bench measured: versioned, hashed, and merged with others' files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mst import serial
from mst.bench.matrix import PROCEDURE
from mst.bench.results import ABSENT, FORECAST, Measured, Results, place_of
from mst.durable import write_text
from mst.errors import MstError, UsageError

SCHEMA = "mst-bench/2"
# In its cells, what is the procedure's stands beside the rest.
_FLAT = "mst-bench/1"


class ResultsError(MstError):
    """A file of results can't be read, or isn't what `mst bench` wrote."""


def content_hash(plain: object) -> str:
    """Return the SHA-256 of plain JSON values, however they are laid out in a file."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_results(path: Path, results: Results) -> None:
    """Write results as JSON at once, with schema and hash.

    Raises:
        ResultsError: they can't be written.
    """
    plain = serial.to_json(results)
    document = {"schema": SCHEMA, "sha256": content_hash(plain), "results": plain}
    try:
        write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror}. Free some space.") from None


def read_results(path: Path) -> Results:
    """Return the results in a file, or in the `results.json` of a directory.

    Raises:
        ResultsError: they can't be read, are of another schema, or were changed by hand.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"cannot read the results {file}: {error.strerror}.") from None
    except ValueError:
        raise ResultsError(f"{file} is not JSON, so no results of `mst bench`.") from None
    if not isinstance(document, dict) or "schema" not in document:
        raise ResultsError(f"{file} is no results of `mst bench`: it names no schema.")
    if document["schema"] not in (SCHEMA, _FLAT):
        raise ResultsError(
            f"{file} is of schema {document['schema']!r}; this mst reads {_FLAT!r} and {SCHEMA!r}."
            " Show it with the mst that wrote it, or measure again."
        )
    plain = document.get("results")
    if content_hash(plain) != document.get("sha256"):
        raise ResultsError(
            f"{file} is not as `mst bench` wrote it: its contents don't have the SHA-256 that"
            " stands in it. It was edited or damaged; take the original, or measure again."
        )
    try:
        return serial.from_json(Results, _upgraded(plain))
    except ValueError as error:
        raise ResultsError(f"{file} is damaged: {error}") from None


def _upgraded(plain: Any) -> Any:
    """Return results with cells as this schema has them."""
    cells = plain.get("cells") if isinstance(plain, dict) else None
    if not isinstance(cells, list):
        return plain
    return {**plain, "cells": [_nested(each) for each in cells]}


def merge(named: Sequence[tuple[str, Results]], created: str) -> Results:
    """Return the results of several files as one.

    Args:
        named: each with its file's name, for the errors.
        created: UTC, ISO 8601.

    Raises:
        UsageError: two of them have a cell of the same device on the same machine, with other
            figures.
    """
    cells: dict[tuple[str, ...], tuple[str, Measured]] = {}
    notes: list[str] = []
    for name, results in named:
        notes += [each for each in results.notes if each not in notes]
        for each in results.cells:
            key = place_of(each)
            known = cells.get(key)
            if known is not None and known[1] != each:
                raise UsageError(
                    f"{known[0]} and {name} both have the cell {each.id} ({each.cell.model},"
                    f" {each.cell.method}, {each.cell.length}, {each.cell.batch}) of"
                    f" {key[1] or 'no device'} on {key[2] or 'no machine'}, with other figures."
                    " Leave one of the files out."
                )
            cells[key] = known or (name, each)
    found = [each for _, each in cells.values()]
    # A site without the device says nothing where another has it.
    there = {each.id for each in found if each.status not in (ABSENT, FORECAST)}
    kept = [each for each in found if each.status != ABSENT or each.id not in there]
    kept.sort(key=lambda each: each.status == FORECAST)
    names = list(dict.fromkeys(results.name for _, results in named))
    return Results(" + ".join(names), created, tuple(kept), tuple(notes))


def measured_from(plain: Any) -> Measured:
    """Return a cell from plain JSON, of this schema or the one before.

    Raises:
        ValueError: it is none.
    """
    return serial.from_json(Measured, _nested(plain))


def _nested(plain: Any) -> Any:
    """Return a cell of the first schema as this one has it; another as it is."""
    cell = plain.get("cell") if isinstance(plain, dict) else None
    if not isinstance(cell, dict) or "procedure" in cell:
        return plain
    own = {key: value for key, value in cell.items() if key not in PROCEDURE}
    procedure = {key: value for key, value in cell.items() if key in PROCEDURE}
    return {**plain, "cell": {**own, "procedure": procedure}}
