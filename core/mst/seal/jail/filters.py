"""The seccomp programs: which system calls of a jailed process are refused, allowed or judged.

Classic BPF, made by hand: a filter has no loops and no library, and a reader can check each line
(Documentation/userspace-api/seccomp_filter.rst). Every test of an argument looks at what the kernel
passes by value; what lies behind a pointer is judged by the broker, which does the call itself.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from mst.seal.jail.syscalls import Machine

# <linux/bpf_common.h>: load; jump if equal, if greater or equal, if a bit is set; and; return.
LOAD, JEQ, JGE, JSET, AND, RET = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
ALLOW, KILL, NOTIFY = 0x7FFF0000, 0x80000000, 0x7FC00000
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
STREAM, DATAGRAM, SEQUENCED = 1, 2, 5
# Routes and addresses of interfaces; news of devices, which udev's library listens to.
NETLINK_ROUTE, NETLINK_KOBJECT_UEVENT = 0, 15
TCP, UDP = 6, 17
MSG_FASTOPEN = 0x20000000
NEW_LISTENER = 8
# <linux/sched.h>: any of these gives a new process a namespace of its own.
NEW_NAMESPACES = 0x7E020000
# Typing into the terminal, or into the console: a way to have the user's shell act.
TIOCSTI, TIOCLINUX, TIOCCONS = 0x5412, 0x541C, 0x541D

REFUSED_ALWAYS = (
    "io_uring_setup", "io_uring_enter", "io_uring_register", "setns", "unshare", "ptrace",
    "pidfd_getfd", "process_vm_readv", "process_vm_writev", "kcmp", "bpf", "perf_event_open",
    "userfaultfd", "mount", "umount2", "pivot_root", "chroot", "open_tree", "open_tree_attr",
    "move_mount", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr", "keyctl", "add_key",
    "request_key", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load",
    "open_by_handle_at", "swapon", "swapoff", "reboot", "acct", "quotactl", "iopl", "ioperm",
)  # fmt: skip

Instruction = tuple[int, int, int, int]


@dataclass(frozen=True)
class Rules:
    """What a filter leaves open.

    Attributes:
        unix: "broker" lets a process make unix stream sockets, and the broker judges where they
            connect; "none" refuses the family.
        inet: "namespace" lets it use TCP and UDP, for its namespace leads nowhere; "broker" TCP
            alone, and the broker judges every connect, bind and listen; "none" refuses them.
    """

    unix: str
    inet: str

    @property
    def listener(self) -> bool:
        """Whether the filter asks a broker."""
        return "broker" in (self.unix, self.inet)


def refuse(number: int) -> int:
    """Return the action that ends a call with an errno."""
    return 0x00050000 | number


def _argument(index: int) -> Instruction:
    # The low word: both machines are little endian. The kernel takes these arguments as int.
    return (LOAD, 0, 0, ARGUMENTS + 8 * index)


def _one_of(values: Sequence[int], action: int = refuse(errno.EACCES)) -> list[Instruction]:
    """Return instructions that allow the values of the accumulator and end all others."""
    last = len(values)
    tests = [(JEQ, last - at, 0, value) for at, value in enumerate(values)]
    return [*tests, (RET, 0, 0, action), (RET, 0, 0, ALLOW)]


def _kind(types: Sequence[int], protocols: Sequence[int]) -> list[Instruction]:
    """Return instructions that look at a socket's type and protocol, and end the call."""
    after = _one_of(protocols)
    tests: list[Instruction] = [_argument(1), (AND, 0, 0, 0xF)]
    last = len(types)
    tests += [(JEQ, last - at, 0, value) for at, value in enumerate(types)]
    return [*tests, (RET, 0, 0, refuse(errno.EACCES)), _argument(2), *after]


def _families(rules: Rules) -> list[Instruction]:
    bodies: list[tuple[int, list[Instruction]]] = []
    if rules.unix == "broker":
        # No datagrams: their receiver lies behind a pointer of sendmsg, which is asked too often.
        bodies.append((AF_UNIX, _kind((STREAM, SEQUENCED), (0, AF_UNIX))))
    if rules.inet == "namespace":
        both = _kind((STREAM, DATAGRAM), (0, TCP, UDP))
        bodies += [(AF_INET, both), (AF_INET6, both)]
    elif rules.inet == "broker":
        stream = _kind((STREAM,), (0, TCP))
        bodies += [(AF_INET, stream), (AF_INET6, stream)]
    # Its types mean the same; the protocol says what one talks to.
    netlink = [_argument(2), *_one_of((NETLINK_ROUTE, NETLINK_KOBJECT_UEVENT))]
    bodies.append((AF_NETLINK, netlink))
    made: list[Instruction] = [_argument(0)]
    for family, body in bodies:
        made += [(JEQ, 0, len(body), family), *body]
    return [*made, (RET, 0, 0, refuse(errno.EACCES))]


def _without_bits(argument: int, bits: int, number: int) -> list[Instruction]:
    return [
        _argument(argument),
        (JSET, 0, 1, bits),
        (RET, 0, 0, refuse(number)),
        (RET, 0, 0, ALLOW),
    ]


def _bodies(rules: Rules) -> dict[str, list[Instruction]]:
    """Return what happens at each system call that isn't simply allowed."""
    made: dict[str, list[Instruction]] = {
        "socket": _families(rules),
        "socketpair": [_argument(0), *_pair()],
        "clone": _without_bits(0, NEW_NAMESPACES, errno.EPERM),
        # Its flags lie behind a pointer; C libraries then take clone.
        "clone3": [(RET, 0, 0, refuse(errno.ENOSYS))],
        "ioctl": [
            _argument(1),
            (JEQ, 2, 0, TIOCSTI),
            (JEQ, 1, 0, TIOCLINUX),
            (JEQ, 0, 1, TIOCCONS),
            (RET, 0, 0, refuse(errno.EPERM)),
            (RET, 0, 0, ALLOW),
        ],
        # With the broker gone, a filter of the process's own could answer in its place.
        "seccomp": _without_bits(1, NEW_LISTENER, errno.EPERM),
    }
    if rules.listener:
        made["connect"] = [(RET, 0, 0, NOTIFY)]
    if rules.inet == "broker":
        made["bind"] = made["listen"] = [(RET, 0, 0, NOTIFY)]
        # Connects by itself.
        made["sendto"] = _without_bits(3, MSG_FASTOPEN, errno.EACCES)
        made["sendmsg"] = _without_bits(2, MSG_FASTOPEN, errno.EACCES)
        made["sendmmsg"] = _without_bits(3, MSG_FASTOPEN, errno.EACCES)
    for name in REFUSED_ALWAYS:
        made[name] = [(RET, 0, 0, refuse(errno.EPERM))]
    return made


def _pair() -> list[Instruction]:
    body = _kind((STREAM, SEQUENCED), (0, AF_UNIX))
    return [(JEQ, 0, len(body), AF_UNIX), *body, (RET, 0, 0, refuse(errno.EACCES))]


def instructions(machine: Machine, rules: Rules) -> list[Instruction]:
    """Return the filter as (code, jump if true, jump if false, operand)."""
    made: list[Instruction] = [
        (LOAD, 0, 0, ARCH),
        (JEQ, 1, 0, machine.audit),
        (RET, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine.name == "x86_64":
        # The x32 calls have numbers of their own for the same things.
        made += [(JGE, 0, 1, 0x40000000), (RET, 0, 0, refuse(errno.ENOSYS))]
    for name, body in _bodies(rules).items():
        if name in machine.numbers:
            made += [(JEQ, 0, len(body), machine.numbers[name]), *body]
    return [*made, (RET, 0, 0, ALLOW)]


def packed(program: Sequence[Instruction]) -> bytes:
    """Return a program as an array of struct sock_filter."""
    return b"".join(struct.pack("HBBI", *each) for each in program)
