"""Which unix sockets a network namespace holds, as the kernel lists them.

A socket's file can be moved, linked and swapped; the kernel's list says which inode it was bound
to (sock_diag(7), <linux/unix_diag.h>).
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

_NETLINK_SOCK_DIAG, _BY_FAMILY, _DUMP = 4, 20, 0x301
_DONE, _ERROR = 3, 2
_SHOW_NAME, _SHOW_FILE = 1, 2
_NAME, _FILE = 0, 1


@dataclass(frozen=True)
class Bound:
    """A unix socket that has a name.

    Attributes:
        socket: inode of the socket itself.
        name: abstract names begin with a zero byte.
        file: (device, inode) of the file it was bound to; None when abstract.
    """

    socket: int
    name: bytes
    file: tuple[int, int] | None


def connection() -> socket.socket:
    """Return a netlink socket that lists what this process's network namespace holds.

    Raises:
        OSError: the kernel has no unix_diag.
    """
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 4)
    try:
        bound(made)
    except BaseException:
        made.close()
        raise
    return made


def bound(diag: socket.socket) -> list[Bound]:
    """Return the named unix sockets of the namespace in which `diag` was made.

    Raises:
        OSError: the kernel refuses the question.
    """
    question = struct.pack("=BBHIIIII", 1, 0, 0, 0xFFFFFFFF, 0, _SHOW_NAME | _SHOW_FILE, 0, 0)
    diag.send(struct.pack("=IHHII", 16 + len(question), _BY_FAMILY, _DUMP, 1, 0) + question)
    found: list[Bound] = []
    while True:  # to its end: what is left unread would answer the next question
        answer = diag.recv(1 << 17)
        at = 0
        while at + 16 <= len(answer):
            length, kind = struct.unpack_from("=IH", answer, at)
            if kind == _ERROR:
                number = -struct.unpack_from("=i", answer, at + 16)[0]
                raise OSError(number, f"unix_diag: {os.strerror(number)}")
            if kind == _DONE:
                return found
            one = _parsed(answer[at + 16 : at + length])
            if one is not None:
                found.append(one)
            at += (length + 3) & ~3


def _parsed(body: bytes) -> Bound | None:
    number = struct.unpack_from("=I", body, 4)[0]
    name, file, at = b"", None, 16
    while at + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, at)
        value = body[at + 4 : at + length]
        if kind == _NAME:
            name = value
        elif kind == _FILE:
            inode, device = struct.unpack_from("=II", value)
            file = (device, inode)
        at += max(4, (length + 3) & ~3)
    return Bound(number, name, file) if name else None


def file_of(opened: int) -> tuple[int, int]:
    """Return (device, inode) of an open file in the kernel's own numbers, as unix_diag has them.

    On overlayfs and btrfs stat(2) says other ones.
    """
    status = os.fstat(opened)
    inode = status.st_ino
    device = os.major(status.st_dev) << 20 | os.minor(status.st_dev)
    mount = ""
    for line in Path(f"/proc/self/fdinfo/{opened}").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == "ino":  # since Linux 5.14
            inode = int(value)
        elif key == "mnt_id":
            mount = value.strip()
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        words = line.split(" ", 3)
        if words[0] == mount:
            major, _, minor = words[2].partition(":")
            device = int(major) << 20 | int(minor)
    return device & 0xFFFFFFFF, inode & 0xFFFFFFFF
