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
    # core(5): the limit is not enforced for dumps that are piped to a program, as systemd-coredump
    # and apport take them. But 1 stops these too (do_coredump in fs/coredump.c), and is too small
    # for a file. Where the limit is 0 for good it can't be raised.
    with suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    # For what takes dumps without asking the limit: with the filter at 0 they hold no memory
    # mapping at all.
    with suppress(OSError):
        _FILTER.write_text("0", encoding="ascii")
