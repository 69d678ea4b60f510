"""The memory of a process that holds rows: the kernel writes none of it to a file."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

_FILTER = Path("/proc/self/coredump_filter")


def core_dumps_off() -> None:
    """Let the kernel dump nothing of this process and of those that it starts.

    Both settings are inherited, over fork and exec alike, and neither can be taken back by a
    process without privileges.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # core(5): the limit is not enforced for dumps that are piped to a program, as systemd-coredump
    # and apport take them; with the filter at 0 those hold no memory mapping at all.
    with suppress(OSError):
        _FILTER.write_text("0", encoding="ascii")
