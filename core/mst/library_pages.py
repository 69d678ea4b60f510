"""Memory that libraries' code takes in this process, given back where only loading has used it.

torch runs code all over its 340 MB as it is imported, and the kernel maps 64 KB around each place:
libtorch_cpu.so alone held 65 MB of a server's resident set. What is still used is mapped again as
it is called, out of the system's cache of files.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_MAPS = Path("/proc/self/smaps")
# Address, permissions and file of a mapping (proc_pid_smaps(5)); code that nobody may write to.
_CODE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ [1-9]\d* +(/.*)$")
_HEAD = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")
_MADV_DONTNEED = 4


def release() -> None:
    """Let go of all pages of code; does nothing where the system does not tell of them."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    with suppress(OSError):
        for begin, end in list(_clean(_MAPS.read_text("utf-8", "replace"))):
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _clean(smaps: str) -> Iterator[tuple[int, int]]:
    """Yield where code lies that is as its file has it.

    A page that was changed in memory, as by a relocation or a debugger, would come back unchanged.
    """
    place: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if _HEAD.match(line):
            found = _CODE.match(line)
            place = None if found is None else (int(found[1], 16), int(found[2], 16))
        elif place is not None and line.startswith("Anonymous:"):
            if line.split()[1] == "0":
                yield place
            place = None
