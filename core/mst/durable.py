"""Writing so that a crash, a full disk or a power cut leaves the old or the new, never a half."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from pathlib import Path

# What a disk that can't be written answers; a limit on a file's size is one of them.
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def sync_directory(path: Path) -> None:
    """Make a directory's entries durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make a file that another library wrote durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Replace a file's contents at once: written beside it, synced, renamed over it.

    Args:
        path: the file.
        text: all of it.
        mode: permissions that it is made with, less the process's umask.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # an old one keeps its permissions
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def copy_file(source: Path, target: Path) -> str:
    """Copy a file to a new one, and return the SHA-256 of what was read, in hexadecimal."""
    hasher = hashlib.sha256()
    with source.open("rb") as old, target.open("xb") as new:
        while block := old.read(1 << 22):
            hasher.update(block)
            new.write(block)
    return hasher.hexdigest()


def file_listing(directory: Path) -> dict[str, dict[str, str | int]]:
    """Return "sha256" and "bytes" of every file below a directory, by its relative path."""
    return {
        str(each.relative_to(directory)): {"sha256": sha256(each), "bytes": each.stat().st_size}
        for each in sorted(directory.rglob("*"))
        if each.is_file()
    }


def seal_directory(part: Path, target: Path) -> None:
    """Sync everything in `part`, then give it its final name."""
    for directory, _, names in os.walk(part, topdown=False):
        for name in names:
            sync_file(Path(directory) / name)
        sync_directory(Path(directory))
    part.rename(target)
    sync_directory(target.parent)


def why_unwritten(error: BaseException | None) -> str:
    """Return why the disk took no more, in the system's words; "" for an error of another kind."""
    from safetensors import SafetensorError

    if isinstance(error, OSError) and error.errno in _UNWRITTEN:
        return os.strerror(error.errno)
    if not isinstance(error, SafetensorError) or "while serializing" not in str(error):
        return ""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])) if number else str(error)
