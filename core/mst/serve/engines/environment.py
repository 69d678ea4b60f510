"""Virtual environments of engines: where they lie, what is in them, and the command that makes one.

For plugins: an engine that disagrees with mst's own packages lies in an environment of its own.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from pathlib import Path

from mst.serve.engines import EngineEnvironment


def environment_dir(engine: str, backend: str) -> Path:
    """Return where the environment of an engine lies unless `--engine-dir` says otherwise.

    Beside the user's other data: an environment has gigabytes, and several of mst may share it.

    Args:
        engine: its name.
        backend: of the device; builds for a CPU and for CUDA exclude each other.
    """
    import platformdirs

    return platformdirs.user_data_path("mst") / "engines" / f"{engine}-{backend}"


def pinned_environment(
    directory: str, engine: str, requirements: Path, *names: str
) -> EngineEnvironment:
    """Return what an environment holds, held against the version that the engine's rules are of.

    Args:
        directory: of a virtual environment; it need not be there.
        engine: as its makers spell it.
        requirements: file for pip, which pins the first of `names`.
        names: of distributions that have the engine.
    """
    version = installed_version(directory, *names)
    wanted = requirements_version(requirements, names[0])
    reason = ""
    if not version:
        reason = f"{engine} is not in {directory}"
    elif version != wanted:
        reason = f"mst's rules are those of {engine} {wanted}"
    return EngineEnvironment(venv_command(directory, requirements), version, reason)


def installed_version(directory: str, *names: str) -> str:
    """Return the version of the first of these distributions that an environment has, or "".

    Args:
        directory: of a virtual environment; it need not be there.
        names: of distributions.
    """
    places = [str(each) for each in Path(directory).glob("lib/python3.*/site-packages")]
    found = {
        _normal(each.metadata["Name"]): each.version
        for each in importlib.metadata.distributions(path=places)
    }
    return next((found[_normal(name)] for name in names if _normal(name) in found), "")


def venv_command(directory: str, requirements: Path) -> str:
    """Return the one command line that makes a virtual environment with these requirements.

    Args:
        directory: of the environment.
        requirements: file for pip.
    """
    place = shlex.quote(directory)
    python = shlex.quote(str(Path(directory) / "bin" / "python"))
    return (
        f"{shlex.quote(sys.executable)} -m venv {place} && {python} -m pip install"
        f" -r {shlex.quote(str(requirements))}"
    )


def requirements_version(requirements: Path, name: str) -> str:
    """Return the version that a requirements file pins a distribution to.

    Raises:
        KeyError: it does not.
    """
    for line in requirements.read_text(encoding="utf-8").splitlines():
        found, _, version = line.partition("==")
        if _normal(found.strip()) == _normal(name):
            return version.strip()
    raise KeyError(name)


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")
