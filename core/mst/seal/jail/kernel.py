"""The kernel's calls that Python has no name for."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

from mst.seal.jail.filters import NEW_LISTENER, Instruction, packed
from mst.seal.jail.syscalls import MACHINES, Machine

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 4, 24, 38, 47
PR_SET_PTRACER = 0x59616D61
CAP_NET_ADMIN, CAP_SYS_PTRACE = 12, 19
# <linux/seccomp.h>
RECEIVE, SEND, IS_VALID = 0xC0502100, 0xC0182101, 0x40082102
WAIT_KILLABLE = 1 << 5
PIDFD_THREAD = os.O_EXCL


def libc() -> ctypes.CDLL:
    """Return the C library, with errno kept."""
    return ctypes.CDLL(None, use_errno=True)


def machine() -> Machine | None:
    """Return this processor's numbers, or None where none are known."""
    return MACHINES.get(os.uname().machine)


def checked(result: int, what: str) -> int:
    """Return a call's result, or raise its errno as OSError."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def system(name: str, *arguments: object) -> int:
    """Do a system call by its name and return what it returns.

    Raises:
        OSError: its errno.
    """
    here = machine()
    if here is None:
        raise OSError(errno.ENOSYS, f"{name}: no number is known for {os.uname().machine}")
    plain = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return checked(libc().syscall(ctypes.c_long(here.numbers[name]), *plain), name)


def prctl(option: int, *arguments: int) -> int:
    """Do prctl and return what it returns.

    Raises:
        OSError: its errno.
    """
    words = [ctypes.c_ulong(each) for each in (*arguments, 0, 0, 0, 0)[:4]]
    return checked(libc().prctl(ctypes.c_int(option), *words), f"prctl({option})")


def permitted() -> int:
    """Return the capabilities that this process may use, as bits."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapPrm:"))


def drop_capabilities(keep: Sequence[int] = ()) -> None:
    """Give up every capability but those to `keep` that it has, for this process and all it starts.

    Raises:
        OSError: the kernel refuses.
    """
    held = permitted()
    keep = [each for each in keep if held >> each & 1]
    for number in range(64):
        if number in keep:
            continue
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno == errno.EINVAL:  # past the last one that this kernel has
                break
            if error.errno != errno.EPERM:
                raise
    try:
        prctl(PR_CAP_AMBIENT, 4)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    low = sum(1 << each for each in keep)
    # Version 3 has two words each of: effective, permitted, inheritable.
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    data = ctypes.create_string_buffer(struct.pack("6I", low, low, 0, 0, 0, 0))
    system("capset", header, data)


def install_filter(program: Sequence[Instruction], listener: bool) -> int:
    """Put a seccomp program over this thread and all it starts; it can't be taken off.

    Returns:
        A file descriptor that hears of judged calls when `listener`, else 0.
    """
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    code = ctypes.create_string_buffer(packed(program))
    described = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    )
    if not listener:
        return system("seccomp", 1, 0, described)
    try:
        # A signal must not begin a call anew that the broker has done already (Linux 5.19).
        return system("seccomp", 1, NEW_LISTENER | WAIT_KILLABLE, described)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return system("seccomp", 1, NEW_LISTENER, described)


def process_fd(task: int, process: int) -> int:
    """Return a pidfd of a thread, or where the kernel has none (before 6.9) of its process."""
    try:
        return system("pidfd_open", task, PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return system("pidfd_open", process, 0)
