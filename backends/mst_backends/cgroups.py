"""What the kernel's control groups leave to this process: CPU time and memory.

A container or a batch system rarely hides the machine's cores and memory; it limits their use, in
any group from the process's own up to the root. The strictest group counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Version 1 writes "no limit" as the largest page-aligned 63-bit number.
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class CpuQuota:
    """CPU time a process may use, in CPUs, and the file that says so."""

    cpus: float
    source: str


@dataclass(frozen=True)
class MemoryLimit:
    """Memory of one group: its limit, how much of it is left, and the file with the limit."""

    limit_bytes: int
    free_bytes: int
    source: str


def cpu_quota(root: Path) -> CpuQuota | None:
    """Return the smallest CPU quota over this process, or None when there is none.

    Args:
        root: where /proc and /sys are; "/" except in tests.

    Source: kernel documentation, admin-guide/cgroup-v2 (cpu.max) and scheduler/sched-bwc
    (cpu.cfs_quota_us).
    """
    quotas = []
    for group in _groups(root, ""):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal():
            quotas.append(CpuQuota(int(quota) / int(period), _name(root, group / "cpu.max")))
    for group in _groups(root, "cpu"):
        file = group / "cpu.cfs_quota_us"
        limit, duration = _number(file), _number(group / "cpu.cfs_period_us")
        if limit is not None and limit > 0 and duration:
            quotas.append(CpuQuota(limit / duration, _name(root, file)))
    return min(quotas, key=lambda one: one.cpus, default=None)


def memory_limits(root: Path) -> list[MemoryLimit]:
    """Return every memory limit over this process; the page cache counts as free.

    Args:
        root: where /proc and /sys are; "/" except in tests.

    Source: kernel documentation, admin-guide/cgroup-v2 (memory.max, memory.high) and
    admin-guide/cgroup-v1/memory (limit_in_bytes).
    """
    limits = []
    for group in _groups(root, ""):
        # Past memory.high the kernel stalls the process instead of killing it: no use either.
        for file in (group / "memory.max", group / "memory.high"):
            used = _used(group, "memory.current", "inactive_file")
            limits.append((file, _number(file), used))
    for group in _groups(root, "memory"):
        file = group / "memory.limit_in_bytes"
        used = _used(group, "memory.usage_in_bytes", "total_inactive_file")
        limits.append((file, _number(file), used))
    return [
        MemoryLimit(limit, max(0, limit - used), _name(root, file))
        for file, limit, used in limits
        if limit is not None and limit < _UNLIMITED
    ]


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the groups over this process, its own first; `controller` is "" for version 2."""
    own = _own_group(root, controller)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        mounted, at = mount.split()[3:5]
        kind, options = filesystem.split()[0], filesystem.split()[-1].split(",")
        if own is None or kind != ("cgroup" if controller else "cgroup2"):
            continue
        if controller and controller not in options:
            continue
        top = root / at.lstrip("/")
        # A container sees its group's path from outside, but its mount begins at that group.
        inside = PurePosixPath(own)
        parts = inside.relative_to(mounted).parts if inside.is_relative_to(mounted) else ()
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth])


def _own_group(root: Path, controller: str) -> str | None:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return None


def _used(group: Path, usage: str, reclaimable: str) -> int:
    """Return the bytes that a group holds and that the kernel cannot simply drop."""
    statistics = dict(
        line.split(maxsplit=1) for line in _text(group / "memory.stat").splitlines() if " " in line
    )
    return max(0, (_number(group / usage) or 0) - int(statistics.get(reclaimable, "0")))


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.removeprefix("-").isdecimal() else None


def _text(file: Path) -> str:
    """Return a file's text, or "" when it is not there or not ours to read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _name(root: Path, file: Path) -> str:
    return f"/{file.relative_to(root)}"
