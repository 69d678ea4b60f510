"""The archive of a bug report, and why it could not be written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mst.errors import RunError
from mst.private_zip import write_new


def write(members: Mapping[str, bytes], target: Path) -> None:
    """Write files as a zip archive with mode 0600.

    Raises:
        RunError: something is at `target`, or it can't be written.
    """
    if not target.name or target.is_dir():
        raise RunError(f"cannot write {target}: it is a directory. Pass --output FILE.")
    try:
        write_new(members, target)
    except OSError as error:
        taken = isinstance(error, FileExistsError)
        reason = "a file is there, which is never overwritten" if taken else error.strerror
        raise RunError(f"cannot write {target}: {reason}. Pass another --output FILE.") from None
