"""Where a jailed process may write: Landlock, where the kernel has it.

It also keeps the process from looking into, or typing into, others of the same user outside.
Constants are those of <linux/landlock.h>.
"""

from __future__ import annotations

import ctypes
import fnmatch
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from mst.seal.jail import kernel

_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
_PATH_BENEATH = 1
_WRITE_FILE = 1 << 1
# Remove, make and link files of every kind; from ABI 2 on move them, from ABI 3 on truncate them.
_TREE = sum(1 << bit for bit in range(4, 13))
_REFER, _TRUNCATE = 1 << 13, 1 << 14
# From ABI 5 on: ioctl of device nodes, which can be had without opening them for writing.
_CONTROL = 1 << 15
# From ABI 6 on: no abstract sockets and no signals of processes outside.
_SCOPES = 0b11
# Before it no file can be moved to another directory, which checkpoints do.
LEAST_ABI = 2
# Of /dev, what no chip needs: memory, disks, virtual machines, other machines, typing. A vendor's
# node may have any name, so all others are left.
_WITHHELD = (
    "mem", "kmem", "port", "kmsg", "snapshot", "nvram", "mapper", "disk", "block", "char", "bus",
    "bsg", "sg*", "nvme*", "ng[0-9]*", "raw", "loop*", "vfio", "vhost-*", "kvm", "vsock", "net",
    "ppp", "infiniband", "input", "uinput", "uhid", "hidraw*", "fuse", "btrfs-control", "autofs",
    "watchdog*", "tpm*", "mei*", "rfkill", "cpu", "userfaultfd", "ttyS*", "tty[0-9]*", "vcs*",
)  # fmt: skip


def abi() -> int:
    """Return the version of Landlock that the kernel has; 0 for none."""
    try:
        return kernel.system("landlock_create_ruleset", 0, 0, _VERSION)
    except OSError:
        return 0


def cache_of(environ: Mapping[str, str]) -> Path:
    """Return the user's directory for caches, by the XDG Base Directory Specification."""
    home = Path(environ.get("HOME") or "/nonexistent")
    return Path(environ.get("XDG_CACHE_HOME") or home / ".cache")


def make_cache(environ: Mapping[str, str]) -> None:
    """Make that directory for its user alone, as the specification has it, where it is not there.

    A new user has none, and a job that may write under it can't make it itself. Where it can't be
    made, what is to be kept there says so.
    """
    cache = cache_of(environ)
    if environ.get("XDG_CACHE_HOME") or cache.parent.is_dir():
        with suppress(OSError):
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)


def writable(environ: Mapping[str, str], named: Iterable[Path], rdma: bool = False) -> list[Path]:
    """Return the directories and nodes under which a job may write.

    Args:
        environ: the process's environment: HOME, TMPDIR, XDG_CACHE_HOME and the like. The audit
            log's directory is not among what follows: its files are open by then.
        named: what the user named for output; the nearest directory that exists counts.
        rdma: the job spans machines, so InfiniBand's nodes are among them.
    """
    home = Path(environ.get("HOME") or "/nonexistent")
    found = [Path.cwd(), Path(tempfile.gettempdir()), cache_of(environ)]
    found += [Path(environ[name]) for name in ("HF_HOME", "TRITON_CACHE_DIR") if environ.get(name)]
    # Compilers and drivers of chips keep what they made at these places.
    found += [home / name for name in (".triton", ".nv", ".nvidia", "ascend", "atc_data")]
    found = [each for each in found if each.exists() and each != Path("/")]
    for each in named:
        path = each.expanduser().absolute()
        nearest = next(one for one in (path, *path.parents) if one.exists())
        if nearest != Path("/"):
            found.append(nearest)
    return [*found, *nodes(rdma)]


def nodes(rdma: bool = False, directory: Path = Path("/dev")) -> list[Path]:
    """Return the device nodes, and directories of them, that a job may open for writing."""
    withheld = [each for each in _WITHHELD if not (rdma and each == "infiniband")]
    found = []
    for each in sorted(directory.iterdir()):
        if each.is_symlink() or any(fnmatch.fnmatch(each.name, one) for one in withheld):
            continue
        if each.is_char_device() or each.is_dir():
            found.append(each)
    return found


def restrict(paths: Iterable[Path], version: int) -> None:
    """Let this process, and all that it starts, write nowhere but under `paths`.

    Args:
        paths: of directories and files.
        version: of Landlock, as `abi` returns it, at least `LEAST_ABI`.

    Raises:
        OSError: the kernel refuses.
    """
    tree = _TREE | (_REFER if version >= 2 else 0)
    single = _WRITE_FILE | (_TRUNCATE if version >= 3 else 0) | (_CONTROL if version >= 5 else 0)
    words = [tree | single, 0, _SCOPES][: 3 if version >= 6 else 2 if version >= 4 else 1]
    attributes = ctypes.create_string_buffer(struct.pack(f"{len(words)}Q", *words))
    ruleset = kernel.system("landlock_create_ruleset", attributes, 8 * len(words), 0)
    try:
        for path in paths:
            _allow(ruleset, path, tree | single, single)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        kernel.system("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, in_directory: int, of_file: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # it went away, or is not ours to see: then it is not written either
        return
    try:
        rights = in_directory if path.is_dir() else of_file
        # struct landlock_path_beneath_attr is packed: u64, s32.
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, opened))
        kernel.system("landlock_add_rule", ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(opened)
