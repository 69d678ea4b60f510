"""Where the rows of a text file begin, gathered while it is encrypted."""

from __future__ import annotations

import sys
from array import array
from itertools import islice

from mst.errors import EncryptionError

# Set in an entry whose line holds white space alone.
BLANK = 1 << 63
_LINES = {".jsonl", ".ndjson", ".txt"}
_QUOTED = {".csv", ".tsv"}


class RowIndex:
    """Gathers the offset of each line, or of each CSV record, from pieces of a file."""

    def __init__(self, ending: str) -> None:
        """Choose by the original's ending; formats that are no lines get no entries."""
        self.entries = array("Q")
        self._quoted = ending in _QUOTED
        self._used = self._quoted or ending in _LINES
        self._start = self._end = 0
        self._blank = True
        self._quotes = 0

    def add(self, piece: bytes) -> None:
        """Take the next piece."""
        if not self._used:
            return
        lines = piece.split(b"\n")
        for line in islice(lines, len(lines) - 1):
            self._part(line)
            self._end += len(line) + 1
            # A line break within quotes belongs to the record (RFC 4180).
            if not self._quotes & 1:
                self._finish()
        self._part(lines[-1])
        self._end += len(lines[-1])

    def _part(self, text: bytes) -> None:
        if self._quoted:
            self._quotes += text.count(b'"')
        if self._blank and text and not text.isspace():
            self._blank = False

    def _finish(self) -> None:
        self.entries.append(self._start | BLANK if self._blank else self._start)
        self._start, self._blank, self._quotes = self._end, True, 0

    def finished(self) -> bytes:
        """Return the entries as they are written: 8 bytes each, the lowest first."""
        if self._used and self._end > self._start:
            self._finish()
        return _little(self.entries).tobytes()


def entries_of(name: str, data: bytes) -> array[int]:
    """Return the entries of an index that was read.

    Raises:
        EncryptionError: it is no whole number of entries.
    """
    if len(data) % 8:
        raise EncryptionError(f"{name}: its index is damaged. Encrypt the original again.")
    found = array("Q")
    found.frombytes(data)
    return _little(found)


def _little(entries: array[int]) -> array[int]:
    if sys.byteorder == "big":
        entries = array("Q", entries)
        entries.byteswap()
    return entries
