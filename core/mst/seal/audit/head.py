"""The newest checkpoint beside the log, by which its end is found and checked at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Head:
    """What a log was when its last checkpoint was written.

    Attributes:
        checkpoint: as its line holds it.
        files: each file's size, inode and time of change (ns), which tell whether anybody has
            touched it since. They are no proof, since root can set them: only a reason to look.
    """

    checkpoint: Mapping[str, Any]
    files: Mapping[str, Stamp]


def stamp(found: os.stat_result) -> Stamp:
    """Return what changes when a file does."""
    return found.st_size, found.st_ino, found.st_ctime_ns


def stamps(directory: Path, names: Sequence[str]) -> dict[str, Stamp]:
    """Return the stamps of a log's files."""
    return {name: stamp(os.stat(directory / name)) for name in names}


def read(handle: int) -> Head | None:
    """Return the head in an open file; None when it is not whole."""
    try:
        value = json.loads(os.pread(handle, 1 << 24, 0))
        files = {str(name): _stamp(each) for name, each in value["files"].items()}
        checkpoint = value["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Head(checkpoint, files) if isinstance(checkpoint, dict) else None


def _stamp(value: Any) -> Stamp:
    size, inode, changed = (int(each) for each in value)
    return size, inode, changed


def write(handle: int, head: Head) -> None:
    """Replace the head in an open file, durably.

    It is written in place, because a jail may have taken the right to make files in the directory;
    one that a power cut tears is noticed, and the log itself read instead.
    """
    text = json.dumps({"checkpoint": head.checkpoint, "files": head.files}) + "\n"
    data = text.encode("utf-8")
    os.pwrite(handle, data, 0)
    os.ftruncate(handle, len(data))
    os.fdatasync(handle)
