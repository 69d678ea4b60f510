"""Look for CANN, Huawei's driver and torch_npu, by files and variables alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Where the installers put it; from CANN 8.5 on it is `cann`.
TOOLKITS = ("usr/local/Ascend/ascend-toolkit", "usr/local/Ascend/cann")
DRIVER = "usr/local/Ascend/driver"
# torch_npu is linked against it, and the loader misses it first.
LIBRARY = "libhccl.so"


@dataclass(frozen=True)
class Cann:
    """CANN as this process would use it.

    Attributes:
        home: the toolkit that the variables name, "" when they name none that exists.
        version: of that toolkit or of the one at its usual place, "" when unknown.
        missing: what keeps torch_npu from loading, "" when nothing does.
        set_env: the script that sets its variables, "" when none was found.
    """

    home: str
    version: str
    missing: str
    set_env: str


@dataclass(frozen=True)
class Extension:
    """The torch_npu package beside torch.

    Attributes:
        installed: `import torch_npu` would find a file.
        version: of it, "" when unknown.
        torch_version: of torch, "" when torch is not installed.
    """

    installed: bool
    version: str
    torch_version: str


def find_cann(root: Path, environ: Mapping[str, str]) -> Cann:
    """Return the CANN toolkit of this machine.

    Args:
        root: "/", or a tree that stands for it.
        environ: the process's variables.
    """
    named = environ.get("ASCEND_HOME_PATH") or environ.get("ASCEND_TOOLKIT_HOME", "")
    home = Path(named) if named and Path(named).is_dir() else None
    usual = [root / place for place in TOOLKITS]
    usual += [Path(environ.get("HOME", "/nonexistent")) / "Ascend" / one.name for one in usual]
    scripts = [home / "set_env.sh", home.parent / "set_env.sh"] if home else []
    scripts += [toolkit / "set_env.sh" for toolkit in usual]
    homes = [home] if home else [one for each in usual for one in (each / "latest", each)]
    return Cann(
        home=str(home or ""),
        version=next((found for one in homes if (found := _toolkit_version(one))), ""),
        missing=_missing(root, environ),
        set_env=next((str(script) for script in scripts if script.is_file()), ""),
    )


def driver_version(root: Path) -> str:
    """Return the version of the installed NPU driver, "" when there is none."""
    return _field(root / DRIVER / "version.info", "Version")


def find_extension() -> Extension:
    """Return whether torch_npu is installed, and both versions; imports neither."""
    spec = importlib.util.find_spec("torch_npu")
    # A folder without __init__.py, left behind by an uninstall, has no origin.
    installed = spec is not None and spec.origin is not None
    version = _distribution("torch-npu") if installed else ""
    return Extension(installed, version, _distribution("torch"))


def same_release(one: str, other: str) -> bool:
    """Return whether two versions agree in major and minor; unknown ones count as agreeing.

    torch_npu is built against one torch release: its metadata says "torch==2.13.0.*", and it has
    post releases of its own.
    """
    if not one or not other:
        return True
    return re.findall(r"\d+", one)[:2] == re.findall(r"\d+", other)[:2]


def _missing(root: Path, environ: Mapping[str, str]) -> str:
    """Return the first thing that torch_npu would miss (its _cann_package_check, 2.13.0)."""
    for name in ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH"):
        if not environ.get(name):
            return f"{name} is not set"
        if not Path(environ[name]).exists():
            return f"{name} names {environ[name]}, which is not there"
    for part in ("runtime", "compiler"):
        if not Path(environ["ASCEND_HOME_PATH"], part).exists():
            return f"{environ['ASCEND_HOME_PATH']} has no {part}"
    folders = [Path(one) for one in environ.get("LD_LIBRARY_PATH", "").split(":") if one]
    if any((folder / LIBRARY).is_file() for folder in folders) or _in_loader_cache(root):
        return ""
    return f"LD_LIBRARY_PATH has no {LIBRARY}"


def _in_loader_cache(root: Path) -> bool:
    try:
        return LIBRARY.encode() in (root / "etc/ld.so.cache").read_bytes()
    except OSError:
        return False


def _toolkit_version(home: Path) -> str:
    files = sorted(home.glob("*-linux/ascend_toolkit_install.info"))
    return next((found for file in files if (found := _field(file, "version"))), "")


def _field(file: Path, name: str) -> str:
    """Return the value of a "name=value" line, "" when there is none."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{name}=(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _distribution(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
