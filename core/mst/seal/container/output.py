"""A new file that has no name before it is whole."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mst.durable import sync_directory
from mst.errors import EncryptionError

# What file systems without unnamed files answer.
_NO_UNNAMED = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}


def refuse_existing(path: Path) -> None:
    """Raise EncryptionError when something stands at `path` already, or its directory doesn't."""
    if path.exists() or path.is_symlink():
        raise EncryptionError(
            f"{path} exists already and is left as it is. Pass another --output, or remove it."
        )
    if not path.parent.is_dir():
        raise EncryptionError(
            f"--output {path} can't be written: there is no directory {path.parent}. Make it first."
        )


@contextlib.contextmanager
def whole_file(path: Path, replaces: bool = False, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Yield a file that gets its name at the end; it leaves nothing when anything fails.

    Where the file system has unnamed files (O_TMPFILE), even a killed process leaves nothing.

    Args:
        path: the name.
        replaces: a file that stands there is replaced at once; else it is an error.
        mode: permissions.

    Raises:
        EncryptionError: the disk is full, the directory is read-only, or `path` exists.
    """
    part = path.with_name(f".{path.name}.part")
    problem = ""
    try:
        handle, unnamed = _opened(path.parent, part, mode)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if unnamed and replaces:
                    part.unlink(missing_ok=True)
                    _name(file.fileno(), part)
                elif unnamed:
                    _name(file.fileno(), path)
            if replaces:
                part.replace(path)
            elif not unnamed:
                os.link(part, path)
        finally:
            if not unnamed or replaces:
                part.unlink(missing_ok=True)
        sync_directory(path.parent)
        return
    except FileExistsError:
        problem = "it exists already"
    except OSError as error:
        problem = error.strerror or type(error).__name__
    raise EncryptionError(
        f"{path} was not written ({problem}), and nothing of it was left behind; what was read is"
        " untouched. Free space, or pass another --output."
    )


def _opened(directory: Path, part: Path, mode: int) -> tuple[int, bool]:
    try:
        return os.open(directory, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, mode), True
    except OSError as error:
        if error.errno not in _NO_UNNAMED:
            raise
    part.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(part, flags, mode), False


def _name(handle: int, path: Path) -> None:
    # linkat(2) with AT_SYMLINK_FOLLOW, which needs no privilege. Without a directory os.link calls
    # link(2), which does not follow.
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        own = f"/proc/self/fd/{handle}"
        os.link(own, path.name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)
