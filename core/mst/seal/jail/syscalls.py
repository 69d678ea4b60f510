"""Numbers of the system calls that the filters name, for each machine that can be sealed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What a filter has to know of a processor's calling convention.

    Attributes:
        name: as `uname -m` says it.
        audit: AUDIT_ARCH_* of <linux/audit.h>, which the kernel gives to a filter.
        numbers: system call to number.
    """

    name: str
    audit: int
    numbers: Mapping[str, int]


# Since Linux 5.1 all machines number new calls alike (Documentation/process/adding-syscalls.rst).
_SHARED = {
    "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438, "io_uring_setup": 425,
    "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446,
    "open_tree_attr": 467,
}  # fmt: skip

# arch/x86/entry/syscalls/syscall_64.tbl of Linux 6.18.
X86_64 = Machine(
    "x86_64",
    0xC000003E,
    _SHARED
    | {
        "ioctl": 16, "socket": 41, "connect": 42, "sendto": 44, "sendmsg": 46, "bind": 49,
        "listen": 50, "socketpair": 53, "clone": 56, "ptrace": 101, "capset": 126,
        "pivot_root": 155, "chroot": 161, "acct": 163, "mount": 165, "umount2": 166, "swapon": 167,
        "swapoff": 168, "reboot": 169, "iopl": 172, "ioperm": 173, "init_module": 175,
        "delete_module": 176, "quotactl": 179, "kexec_load": 246, "add_key": 248,
        "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298,
        "open_by_handle_at": 304, "sendmmsg": 307, "setns": 308, "process_vm_readv": 310,
        "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "seccomp": 317,
        "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323,
    },
)  # fmt: skip

# include/uapi/asm-generic/unistd.h of Linux 6.18.
AARCH64 = Machine(
    "aarch64",
    0xC00000B7,
    _SHARED
    | {
        "ioctl": 29, "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "quotactl": 60,
        "acct": 89, "capset": 91, "unshare": 97, "kexec_load": 104, "init_module": 105,
        "delete_module": 106, "ptrace": 117, "reboot": 142, "socket": 198, "socketpair": 199,
        "bind": 200, "listen": 201, "connect": 203, "sendto": 206, "sendmsg": 211, "add_key": 217,
        "request_key": 218, "keyctl": 219, "clone": 220, "swapon": 224, "swapoff": 225,
        "perf_event_open": 241, "open_by_handle_at": 265, "setns": 268, "sendmmsg": 269,
        "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273,
        "seccomp": 277, "bpf": 280, "userfaultfd": 282, "kexec_file_load": 294,
    },
)  # fmt: skip

MACHINES: Mapping[str, Machine] = {"x86_64": X86_64, "aarch64": AARCH64}
