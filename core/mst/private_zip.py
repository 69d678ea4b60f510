"""A zip file that its user alone can read, whole or not there."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

from mst.durable import sync_directory

# zip holds no time zone: a fixed time tells nothing of when somebody worked, and keeps equal
# archives equal.
_TIME = (1980, 1, 1, 0, 0, 0)


def write_new(members: Mapping[str, bytes], target: Path) -> None:
    """Write files as a zip archive with mode 0600, beside its place, and link it there.

    Raises:
        OSError: it can't be written; FileExistsError where something is at `target`.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "something is there already")
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
    except OSError:
        part.unlink(missing_ok=True)
        raise
