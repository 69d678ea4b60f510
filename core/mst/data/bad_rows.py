"""What becomes of bad rows of several files: the first is an error, or all are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mst.data.refusals import Refusals, RowError
from mst.data.rows import FileFacts
from mst.errors import DataError


class BadRows:
    """The bad rows of several files: raises at the first, or counts them by file.

    Attributes:
        on_bad_row: "error" or "skip".
        last: the last that was counted; None before.
    """

    def __init__(self, on_bad_row: str = "error") -> None:
        """Count nothing yet."""
        self.on_bad_row = on_bad_row
        self.last: RowError | None = None
        self._of_file: dict[str, Refusals] = {}

    def add(self, error: RowError) -> None:
        """Raise `error`, or count it.

        Raises:
            RowError: when bad rows are errors.
        """
        self._of_file.setdefault(error.place.file, Refusals(self.on_bad_row)).add(error)
        self.last = error

    def none_left(self) -> DataError:
        """Return the error for rows of which none can be used."""
        return DataError(f"none of the rows can be used, for example because: {self.last}")

    def recorded(self, files: Sequence[FileFacts]) -> tuple[FileFacts, ...]:
        """Return the facts of files with their bad rows taken off and named."""
        return tuple(self._recorded(each) for each in files)

    def _recorded(self, facts: FileFacts) -> FileFacts:
        listed = self._of_file[facts.path].listed() if facts.path in self._of_file else ()
        rows = facts.rows - sum(refused.rows for refused in listed)
        return replace(facts, rows=rows, skipped=(*facts.skipped, *map(str, listed)))
