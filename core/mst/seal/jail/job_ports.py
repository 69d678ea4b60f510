"""Ports on this machine that processes of one job listen on, when each is in a jail of its own.

Ranks that torchrun or srun started have a broker each. A broker writes what its jail has bound
into a file that it keeps locked; the others believe files that are locked, and a dead broker's
lock is gone. The directory lies where Landlock lets no jail write. Without Landlock a jailed
process could add a port there, and then reach a service of this machine on loopback.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class JobPorts:
    """What this job has bound: by this broker's jail, and by those beside it.

    Attributes:
        directory: of the job, mode 0700; None when there are no others.
        own: (address, port) bound here.
    """

    directory: Path | None = None
    own: set[tuple[str, int]] = field(default_factory=set)
    _file: int = -1

    def add(self, address: str, port: int) -> None:
        """Record a port that the jail has bound."""
        self.own.add((address, port))
        if self.directory is None:
            return
        if self._file < 0:
            path = self.directory / secrets.token_hex(8)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        os.write(self._file, f"{address} {port}\n".encode())

    def __contains__(self, place: tuple[str, int]) -> bool:
        """Return whether some process of the job has bound it."""
        return place in self.own or any(place in each for each in self._others())

    def _others(self) -> list[set[tuple[str, int]]]:
        found = []
        for path in sorted(self.directory.iterdir()) if self.directory else ():
            with contextlib.suppress(OSError, ValueError), path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    lines = [line.split() for line in file.read().splitlines()]
                    found.append({(address, int(port)) for address, port in lines})
                else:
                    path.unlink()
        return found


def job_directory(key: str, runtime: Path | None = None) -> Path:
    """Return the directory in which the brokers of a job meet; made when it isn't there.

    Args:
        key: what only this job has: where its ranks meet.
        runtime: instead of /run/user/UID.

    Raises:
        OSError: it can't be made, or is another user's.
    """
    user = os.geteuid()
    base = runtime or Path(f"/run/user/{user}")
    if not base.is_dir() or not os.access(base, os.W_OK):
        base = Path("/var/tmp")
    path = base
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    for name in (f"mst-jobs-{user}", digest):
        path = path / name
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
        if status.st_uid != user or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
            raise PermissionError(f"{path} is not a directory of uid {user} with mode 0700")
    return path
