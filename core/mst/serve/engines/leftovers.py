"""What an engine leaves when its first process ends: workers, and memory that they have shared.

Prompts pass through such memory, and a process that is killed leaves it to the next boot.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

# That processes have to end by themselves: a resource tracker of Python's clears up after others.
SESSION_SECONDS = 3.0
_MEMORY = "/dev/shm/"


def session(leader: int) -> list[int]:
    """Return the processes of a session that run, without those that wait to be reaped."""
    found = []
    for each in psutil.pids():
        with suppress(OSError, psutil.Error):
            if os.getsid(each) == leader and psutil.Process(each).status() != "zombie":
                found.append(each)
    return found


def shared_memory(processes: Iterable[int], since: float) -> frozenset[Path]:
    """Return the files of /dev/shm that processes have mapped, and that were made since a time."""
    found = set()
    for each in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{each}/maps").read_text("utf-8", "replace").splitlines():
                _, there, name = line.partition(_MEMORY)
                path = Path(_MEMORY + name)
                with suppress(OSError):  # it is gone: " (deleted)" is a part of the name
                    # Some clocks of files go in steps of a second.
                    if there and path.stat().st_ctime >= since - 1:
                        found.add(path)
    return frozenset(found)


def end_session(leader: int, shared: frozenset[Path], since: float) -> None:
    """End all processes of a session, and take away the memory that they have shared.

    Args:
        leader: its first process, which may have ended, but was not reaped.
        shared: files of /dev/shm that are known to be theirs.
        since: `time.time` when the session was begun.
    """
    shared |= shared_memory(session(leader), since)
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = session(leader)
        for each in running:
            with suppress(OSError):
                os.kill(each, number)
        until = time.monotonic() + SESSION_SECONDS
        while running and time.monotonic() < until:
            time.sleep(0.05)
            running = session(leader)
    for path in shared:
        with suppress(OSError):
            path.unlink()
