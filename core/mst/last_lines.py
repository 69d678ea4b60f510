"""The last lines of a file that may be long, and that somebody may still be writing."""

from __future__ import annotations

import os
from pathlib import Path


def last_lines(path: Path, most_bytes: int) -> bytes:
    """Return the end of a file, from the beginning of a line.

    Args:
        path: the file.
        most_bytes: that are read.

    Returns:
        All of a file that is no longer; b"" where the last line alone is longer. The last line may
        be half written.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - most_bytes))
        data = file.read(most_bytes)
    return data.partition(b"\n")[2] if size > most_bytes else data
