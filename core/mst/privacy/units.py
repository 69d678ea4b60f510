"""What is protected: rows, or all rows that have the same value in a column."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from mst.data.refusals import Place, refuse
from mst.data.rows import Row


def unit_value(place: Place, column: str, fields: Mapping[str, Any]) -> str:
    """Return to whom a record belongs; numbers count as their digits, so that files agree.

    Args:
        place: of the record.
        column: as `--dp-unit` names it.
        fields: of the record.

    Raises:
        RowError: it has no such field, or neither text nor a whole number in it.
    """
    value = fields.get(column)
    named = isinstance(value, str) and value.strip() != ""
    if not named and (isinstance(value, bool) or not isinstance(value, int)):
        refuse(
            place,
            f"--dp-unit {column} was asked for, and the row has no text or whole number there",
            "Name a column that says in every row to whom it belongs, or mend the row.",
        )
    return str(value).strip()


def _unit_of(row: Row) -> Hashable:
    """Return what tells a row's unit from others: its value, or else its place."""
    return row.unit if row.unit is not None else (row.file, row.number)


def grouped(rows: Iterable[Row]) -> list[list[int]]:
    """Return the places of each unit's rows. The pieces of a plain text share their row."""
    found: dict[Hashable, list[int]] = {}
    for place, row in enumerate(rows):
        found.setdefault(_unit_of(row), []).append(place)
    return list(found.values())
