"""What a bundle is made for: a kind of device, a Python, and a Linux."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mst.errors import UsageError

DEVICES = ("cpu", "cuda", "ascend")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
AUTO = "auto"
# torch's wheels from 2.7 on ask for glibc 2.28, which RHEL 8, Kylin V10 and openEuler 20.03 have;
# llguidance's for 2.31. RHEL 9 has 2.34.
_COMMON, _AUTO = 28, "2.34"
_PLATFORM = re.compile(r"manylinux_2_([0-9]{1,2})_(x86_64|aarch64)")
# PEP 600: the names before it, by the minor version of glibc. They begin at the first that has
# Python's wheels on that architecture.
_LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
_OLDEST = {"x86_64": 5, "aarch64": 17}


@dataclass(frozen=True)
class Target:
    """What a bundle's wheels run on.

    Attributes:
        device: one of `DEVICES`.
        python: "3.11".
        arch: as the kernel names it.
        glibc: the newest that a wheel may ask for, "2.34".
    """

    device: str
    python: str
    arch: str
    glibc: str


def own_python() -> str:
    """Return the version of this Python, as `--python` takes it."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def target_of(device: str, python: str, name: str) -> Target:
    """Return the target of the command's options.

    Args:
        device: one of `DEVICES`.
        python: "3.11".
        name: "auto" for this machine's architecture, or a platform tag of PEP 600.

    Raises:
        UsageError: no such Python or platform.
    """
    if python not in PYTHONS:
        raise UsageError(
            f"--python takes one of {', '.join(PYTHONS)}; found {python}. It is the Python of the"
            " machine that the bundle is for."
        )
    auto = f"manylinux_{_AUTO.replace('.', '_')}_{platform.machine()}"
    found = _PLATFORM.fullmatch(auto if name == AUTO else name)
    if found is None or int(found[1]) < _OLDEST[found[2]]:
        raise UsageError(
            f"--platform takes auto, manylinux_2_34_x86_64 or manylinux_2_34_aarch64 (another"
            f" glibc than 2.34 may stand there); found {name!r} on {platform.machine()}. mst runs"
            " on Linux with glibc."
        )
    return Target(device, python, found[2], f"2.{found[1]}")


def platform_tag(target: Target) -> str:
    """Return the platform tag of a target, as `--platform` takes it."""
    return f"manylinux_{target.glibc.replace('.', '_')}_{target.arch}"


def platform_tags(target: Target) -> tuple[str, ...]:
    """Return every platform tag of wheels that run on a target, the best first.

    pip expands none of the names of PEP 600 itself. It takes the first that a wheel has; those that
    only newer systems have come last, so that a bundle asks for no more than it must.
    """
    newest, oldest = int(target.glibc.split(".")[1]), _OLDEST[target.arch]
    common = min(newest, _COMMON)
    found: list[str] = []
    for minor in (*range(common, oldest - 1, -1), *range(common + 1, newest + 1)):
        found.append(f"manylinux_2_{minor}_{target.arch}")
        if minor in _LEGACY:
            found.append(f"{_LEGACY[minor]}_{target.arch}")
    return (*found, f"linux_{target.arch}")


def needed_target(target: Target, files: Iterable[str]) -> Target:
    """Return a target with the glibc that these wheels ask for, instead of what they may.

    Args:
        target: that they were chosen for.
        files: names of wheels.
    """
    from packaging.utils import parse_wheel_filename

    newest = _OLDEST[target.arch]
    for name in files:
        tags = {each.platform for each in parse_wheel_filename(name)[3]}
        minors = [int(found[1]) for each in tags if (found := _PLATFORM.fullmatch(each))]
        minors += [minor for minor, old in _LEGACY.items() if f"{old}_{target.arch}" in tags]
        newest = max(newest, min(minors, default=0))
    return replace(target, glibc=f"2.{newest}")


def marker_environment(target: Target) -> dict[str, str]:
    """Return what environment markers (PEP 508) say on a target; its patch release is not known."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{target.python}.0",
        "os_name": "posix",
        "platform_machine": target.arch,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{target.python}.0",
        "python_version": target.python,
        "sys_platform": "linux",
    }
