"""Wheels that a test can make: mst needs them to be there, not to do anything."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmarks.air_gap_kit import OFF_NETWORK
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
TARGET_310 = "3.10"


def make_wheel(
    place: Path, name: str, version: str, requires: Sequence[str] = (), tag: str = "py3-none-any"
) -> Path:
    """Write a wheel of an empty module."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
    files = {
        f"{module}/__init__.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = ""
    for path, text in files.items():
        digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    target = place / f"{module}-{version}-{tag}.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return target


def pip_wheel() -> Path:
    """Return the wheel of pip that Python brings."""
    import ensurepip

    places = [Path(ensurepip.__file__).parent / "_bundled", Path("/usr/share/python-wheels")]
    found = [each for place in places for each in place.glob("pip-*.whl")]
    if not found:
        pytest.skip("wants Python's own wheel of pip (Debian: python3-pip-whl)")
    return found[0]


def versions(name: str) -> set[str]:
    """Return the exact versions of constraints.txt: two where Pythons need different ones."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    read = [Requirement(line) for line in lines if line and line[0] != "#"]
    found = {
        str(each.specifier).removeprefix("==")
        for each in read
        if canonicalize_name(each.name) == canonicalize_name(name)
    }
    return found or {"1.0"}


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a wheel of everything that mst needs, but of mst itself.

    torch is there as wheels are: for one Python and one architecture each.
    """
    if sys.version_info < (3, 11):
        import tomli as tomllib
    else:
        import tomllib

    place = tmp_path_factory.mktemp("wheelhouse")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {Requirement(text).name for text in project["project"]["dependencies"]}
    for name in {*needed, "networkx"} - {"torch"}:
        for version in versions(name):
            make_wheel(place, name, version)
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tags = {
        f"{own}-{own}-manylinux_2_28_{os.uname().machine}",
        "cp310-cp310-manylinux_2_28_aarch64",
    }
    for tag in tags:
        make_wheel(place, "torch", f"{versions('torch').pop()}+cpu", ["networkx"], tag)
    shutil.copy(pip_wheel(), place)
    return place


@pytest.fixture(scope="session")
def off_network() -> list[str]:
    """What a command begins with to run without a network; [] where that is not to be had."""
    if shutil.which(OFF_NETWORK[0]) is None:
        return []
    done = subprocess.run([*OFF_NETWORK, "true"], capture_output=True, check=False)
    return list(OFF_NETWORK) if done.returncode == 0 else []
