"""What an administrator can do where the kernel gives no jail."""

from __future__ import annotations

import errno
from pathlib import Path

_SYSCTLS = (
    # Debian's and Ubuntu's switches, and the kernel's own.
    ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "kernel.apparmor_restrict_unprivileged_userns=0",
    ),
    ("user/max_user_namespaces", "0", "user.max_user_namespaces=15000"),
    ("user/max_net_namespaces", "0", "user.max_net_namespaces=15000"),
)


def reason(error: OSError, proc: Path = Path("/proc")) -> str:
    """Return why a layer can't be had: the kernel's answer, and the switch that is off."""
    what = error.strerror or str(error)
    off = [setting for file, bad, setting in _SYSCTLS if _reads(proc / "sys" / file) == bad]
    if off:
        return f"{what}; `sysctl -w {' '.join(off)}` allows it"
    if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS) and in_container(proc):
        return f"{what}; the container's seccomp or AppArmor profile forbids it"
    return what


def _reads(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def in_container(proc: Path = Path("/proc")) -> bool:
    """Return whether this looks like a container: its root, or its first process, says so."""
    if any((proc.parent / name).exists() for name in (".dockerenv", "run/.containerenv")):
        return True
    # A filter on every process is a container's, or a unit's of systemd.
    return "\nSeccomp:\t2" in _reads(proc / "1/status")


def what_to_do(machine: str) -> str:
    """Return what gives a jail, most usual first; one sentence each."""
    if machine not in ("x86_64", "aarch64"):
        return f"Sealing knows the processors x86_64 and aarch64, and this is {machine}."
    return (
        "The administrator can allow user namespaces (`sysctl -w"
        " user.max_user_namespaces=15000`; on Ubuntu also"
        " kernel.apparmor_restrict_unprivileged_userns=0, on Debian"
        " kernel.unprivileged_userns_clone=1), or start the container with `docker run --network"
        " none`, or with a seccomp profile that allows unshare, seccomp and pidfd_getfd (`docker"
        " run --security-opt seccomp=FILE`). A machine that can't be sealed runs with --jail off"
        ' --jail-reason "…", which is recorded.'
    )
