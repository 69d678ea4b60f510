"""The archive of a bug report: a zip file that its user alone can read, whole or not there."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

from mst.durable import sync_directory
from mst.errors import RunError

# zip holds no time zone; a fixed time tells nothing of when somebody worked.
_TIME = (1980, 1, 1, 0, 0, 0)


def write(members: Mapping[str, bytes], target: Path) -> None:
    """Write files as a zip archive with mode 0600.

    Raises:
        RunError: something is at `target`, or it can't be written.
    """
    if not target.name or target.is_dir():
        raise RunError(f"cannot write {target}: it is a directory. Pass --output FILE.")
    part = target.with_name(f".{target.name}.part")
    try:
        part.unlink(missing_ok=True)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in members.items():
                    archive.writestr(zipfile.ZipInfo(name, _TIME), data, zipfile.ZIP_DEFLATED)
            file.flush()
            os.fsync(file.fileno())
        os.link(part, target)  # unlike a rename, it replaces nothing
        part.unlink()
        sync_directory(target.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        taken = isinstance(error, FileExistsError)
        reason = "a file is there, which is never overwritten" if taken else error.strerror
        raise RunError(f"cannot write {target}: {reason}. Pass another --output FILE.") from None
