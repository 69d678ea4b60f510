"""A network namespace of the job's own: it has loopback and nothing else."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from mst.seal.jail import kernel

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def enter_as_root() -> None:
    """Move this process into a new network namespace, which needs CAP_SYS_ADMIN.

    Raises:
        OSError: the kernel, or the container's seccomp profile, refuses.
    """
    kernel.checked(kernel.libc().unshare(kernel.CLONE_NEWNET), "unshare(CLONE_NEWNET)")
    _raise_loopback()


def enter_unprivileged(network: bool = True) -> None:
    """Move this process into a new user namespace, and with `network` a network namespace too.

    User and group keep their numbers. Must run while the process has one thread.

    Raises:
        OSError: the kernel, the administrator or the container's seccomp profile refuses.
    """
    user, group = os.geteuid(), os.getegid()
    flags = kernel.CLONE_NEWUSER | (kernel.CLONE_NEWNET if network else 0)
    words = "unshare(CLONE_NEWUSER)" if not network else "unshare(CLONE_NEWUSER | CLONE_NEWNET)"
    kernel.checked(kernel.libc().unshare(flags), words)
    for name, text in (
        ("setgroups", "deny"),  # before gid_map, as user_namespaces(7) asks
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        Path("/proc/self", name).write_text(text, encoding="ascii")
    if network:
        _raise_loopback()


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = bytearray(40)
        request[:2] = b"lo"
        request = bytearray(fcntl.ioctl(any_socket, _SIOCGIFFLAGS, bytes(request)))
        flags = struct.unpack_from("H", request, 16)[0]
        struct.pack_into("H", request, 16, flags | _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, bytes(request))


def interfaces(proc: Path = Path("/proc")) -> list[str]:
    """Return the names of this namespace's network interfaces, without loopback."""
    lines = (proc / "self/net/dev").read_text(encoding="ascii").splitlines()[2:]
    return [name for name in (line.partition(":")[0].strip() for line in lines) if name != "lo"]


def caller_of_sudo(environ: Mapping[str, str]) -> tuple[int, int, str] | None:
    """Return number, group and name of the user that called sudo; None when nobody did."""
    user, group = environ.get("SUDO_UID", ""), environ.get("SUDO_GID", "")
    if not (user.isdigit() and group.isdigit() and int(user)):
        return None
    return int(user), int(group), environ.get("SUDO_USER", "")


def become(user: int, group: int, name: str) -> None:
    """Give up being root for a user, with that user's groups.

    Raises:
        OSError: the kernel refuses.
    """
    os.setgroups(groups_of(group, name))
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)


def groups_of(group: int, name: str) -> list[int]:
    """Return the groups of a user; `group` alone where nothing is known of the user."""
    try:
        return os.getgrouplist(name, group) if name else [group]
    except KeyError:
        return [group]


def home_of(user: int) -> str | None:
    """Return a user's home directory, or None when nothing is known of the user."""
    import pwd

    try:
        return pwd.getpwuid(user).pw_dir
    except KeyError:
        return None
