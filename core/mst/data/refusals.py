"""Rows that cannot be used: where they stand, why, and how many. Never what they say."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from typing import NoReturn

from mst.errors import DataError

ON_BAD_ROW = ("error", "skip")
# Row numbers that are kept for each reason, to be shown.
_NUMBERS_KEPT = 5


@dataclass(frozen=True)
class Place:
    """Where something stands: the file, the row (counted as in `mst.data.rows.Row`), the part."""

    file: str
    row: int
    part: str = ""

    def __str__(self) -> str:
        """Return it as an error begins."""
        return f"{self.file}, row {self.row}" + (f", {self.part}" if self.part else "")


class RowError(DataError):
    """One row cannot be used; the rows around it may be.

    Attributes:
        place: where.
        reason: what was expected and what was found, alike for rows that are bad in the same way.
        fix: what to do.
        found: what differs from row to row, such as a column's number.
    """

    def __init__(self, place: Place, reason: str, fix: str, found: str = "") -> None:
        """Keep the parts."""
        super().__init__(f"{place}: {reason}{f' ({found})' if found else ''}. {fix}".rstrip())
        self.place = place
        self.reason = reason
        self.fix = fix
        self.found = found


@dataclass(frozen=True)
class Refused:
    """Rows of one file that were refused for one reason.

    Attributes:
        reason: as in `RowError`.
        fix: of the first of them.
        rows: how many.
        numbers: the first of them.
    """

    reason: str
    fix: str
    rows: int
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        """Return it as one line for a person."""
        shown = ", ".join(map(str, self.numbers)) + (" …" if self.rows > len(self.numbers) else "")
        return f"{self.reason}: {self.rows} (row {shown}). {self.fix}".rstrip()


@dataclass
class Refusals:
    """Says what happens to a bad row, and counts.

    Attributes:
        on_bad_row: "error" raises at the first, "skip" counts it and goes on.
    """

    on_bad_row: str = "error"
    _found: dict[str, Refused] = field(default_factory=dict)

    def add(self, error: RowError) -> None:
        """Raise `error`, or count it.

        Raises:
            RowError: when bad rows are errors.
        """
        if self.on_bad_row == "error":
            raise error
        before = self._found.get(error.reason, Refused(error.reason, error.fix, 0, ()))
        numbers = (*before.numbers, error.place.row)[:_NUMBERS_KEPT]
        self._found[error.reason] = replace(before, rows=before.rows + 1, numbers=numbers)

    def listed(self) -> tuple[Refused, ...]:
        """Return what was counted, most frequent first."""
        return tuple(sorted(self._found.values(), key=lambda each: -each.rows))


def refuse(place: Place, reason: str, fix: str, found: str = "") -> NoReturn:
    """Raise RowError outside any handler, so that no other exception's text hangs on it."""
    raise RowError(place, reason, fix, found) from None


def json_type(value: object) -> str:
    """Return what JSON calls the type of a parsed value, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: dict[type, str] = {str: "text", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")


def shown_names(names: Iterable[str], header: Container[str] | None = None) -> str:
    """Return column names for an error message, at most twelve of them.

    Only what looks like a name is shown; the rest is given by its length.

    Args:
        names: found in a file.
        header: for the first line of a table, names that headers have. A line with fewer than half
            of its names among them may be a row, so it shows no others: "Smith" looks like a name.
    """
    shown = []
    names = list(names)
    known = None if header is None else {name for name in names if name.lower() in header}
    if known is not None and 2 * len(known) >= len(names):
        known = None
    for name in names:
        plain = re.fullmatch(r"[A-Za-z_][\w.-]{0,31}", name, re.ASCII) or re.fullmatch(
            r"\w{1,8}", name
        )
        if known is not None and name not in known:
            plain = None
        shown.append(f"'{name}'" if plain else f"(a name of {len(name)} characters)")
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return ", ".join(shown[:12]) + more if shown else "none"
