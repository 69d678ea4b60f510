"""mst's own wheel and sources, for a bundle."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import mst
from mst.bundle.pip import Pip, run_pip
from mst.errors import BundleError, UsageError

CONSTRAINTS = "constraints.txt"
_NAME = "mst_train"


def checkout(given: str | None) -> Path | None:
    """Return the directory with mst's sources: the given one, or the one that this mst runs from.

    Returns:
        None when this mst was installed from a wheel and no directory was given.

    Raises:
        UsageError: the given directory holds no sources of mst.
    """
    found = Path(mst.__file__).parents[2] if given is None else Path(given).expanduser()
    project = found / "pyproject.toml"
    if project.is_file() and 'name = "mst-train"' in project.read_text(encoding="utf-8"):
        return found
    if given is None:
        return None
    raise UsageError(f"--source {given} holds no sources of mst (a pyproject.toml of mst-train).")


def own_wheel(pip: Pip, source: Path | None, place: Path, work: Path) -> tuple[Path, Path | None]:
    """Put mst's wheel and its sources into a directory.

    A wheel that lies among those given is taken as it is. Otherwise both are built from `source`.

    Args:
        pip: where a build tool is taken from, if it is not installed.
        source: a checkout, or None.
        place: for the wheel and the archive of sources.
        work: a directory of the caller's for what is needed meanwhile.

    Returns:
        The wheel, and the archive of the sources: None where there is only a wheel.

    Raises:
        BundleError: there is neither, or it doesn't build.
    """
    import shutil

    given = (
        [] if pip.wheels is None else sorted(pip.wheels.glob(f"{_NAME}-{mst.__version__}-*.whl"))
    )
    if given:
        archive = given[0].parent / f"{_NAME}-{mst.__version__}.tar.gz"
        copied = [Path(shutil.copy(each, place)) for each in (given[0], archive) if each.is_file()]
        return copied[0], copied[1] if len(copied) > 1 else None
    if source is None:
        raise BundleError(
            "this mst was installed from a wheel, so its sources and constraints aren't here. Pass"
            " --source DIR, a checkout of mst."
        )
    environ = dict(pip.environ)
    if importlib.util.find_spec("hatchling") is None:
        tool = work / "hatchling"
        run_pip(pip, ["install", "--target", str(tool), "hatchling"], "getting the build tool")
        environ["PYTHONPATH"] = f"{tool}{os.pathsep}{environ.get('PYTHONPATH', '')}"
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(place), "-t", "sdist"]
    done = subprocess.run(
        [*build, "-t", "wheel"],
        cwd=source, env=environ, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    wheels = sorted(place.glob(f"{_NAME}-*.whl"))
    archives = sorted(place.glob(f"{_NAME}-*.tar.gz"))
    if done.returncode != 0 or not wheels or not archives:
        said = " / ".join(done.stderr.strip().splitlines()[-2:])[:400]
        raise BundleError(f"mst's wheel could not be built from {source}: {said}.")
    return wheels[0], archives[0]
