"""Write the package with which a vendor begins: one module that installs, loads and finds no chip.

The texts are in `vendor_template` beside this module.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import mst
from mst.durable import seal_directory
from mst.errors import MstError, UsageError

# What is written, and the template of each; the names are templates themselves.
FILES = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "$module.py": "module.py.in",
    "tests/test_conformance.py": "test_conformance.py.in",
}
# Stricter than the registry's names: this one also names a distribution, which may neither end
# with "-" nor tell "-" from "--", and a module.
_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


@dataclass(frozen=True)
class Names:
    """What a new package calls its parts.

    Attributes:
        name: the backend's, as in `--device`.
        distribution: what pip installs.
        module: what Python imports.
        identifier: the name as torch and a device file can have it.
    """

    name: str
    distribution: str
    module: str
    identifier: str


def names_of(name: str, taken: Mapping[str, str]) -> Names:
    """Return the names of a new package.

    Args:
        name: of the backend.
        taken: names of the installed plugins, with the distribution of each.

    Raises:
        UsageError: the name can't be one, or it or what follows from it is taken.
    """
    if not _NAME.fullmatch(name) or name == "auto":
        raise UsageError(
            f"mst backend new {name!r}: a name is lower-case letters and digits, with single '-' or"
            " '_' between them, begins with a letter and is not 'auto'."
        )
    if name in taken:
        raise UsageError(
            f"mst backend new {name}: the name is taken by {taken[name] or 'an unknown package'}."
            " Choose another; `mst plugins` lists those that are taken."
        )
    identifier = name.replace("-", "_")
    names = Names(name, f"mst-{name.replace('_', '-')}", f"mst_{identifier}", identifier)
    if owner := _owner(names):
        raise UsageError(
            f"mst backend new {name}: {owner} is installed here already. Choose another name."
        )
    return names


def _owner(names: Names) -> str:
    """Return what in this environment has the distribution's or the module's name, or ""."""
    try:
        importlib.metadata.distribution(names.distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"a module {names.module}" if importlib.util.find_spec(names.module) else ""
    return f"a package {names.distribution}"


def texts(names: Names) -> dict[str, str]:
    """Return the text of each file of the package, by its path."""
    words = {
        "name": names.name,
        "distribution": names.distribution,
        "module": names.module,
        "identifier": names.identifier,
        "variable": names.identifier.upper(),
        "version": mst.__version__,
    }
    folder = files("mst").joinpath("vendor_template")
    return {
        Template(path).substitute(words): Template(
            folder.joinpath(template).read_text(encoding="utf-8")
        ).substitute(words)
        for path, template in FILES.items()
    }


def write_package(names: Names, target: Path) -> tuple[str, ...]:
    """Write the package and return the paths of its files in `target`; all of them or none.

    Args:
        names: from `names_of`.
        target: a directory that does not exist or is empty.

    Raises:
        UsageError: it is a file, is not empty, or is the current directory.
        MstError: it cannot be written.
    """
    contents = texts(names)
    try:
        _check_target(target)
        parent = target.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        # Written beside it, so that giving it its name is one step.
        with tempfile.TemporaryDirectory(prefix=".mst-backend-new-", dir=parent) as directory:
            part = Path(directory, "package")
            for path, text in contents.items():
                file = part / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            seal_directory(part, target)
    except OSError as error:
        raise MstError(
            f"--output-dir {target} cannot be written: {error.strerror or error}. Name a directory"
            " in one that you can write to."
        ) from error
    return tuple(contents)


def _check_target(target: Path) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise UsageError(f"--output-dir {target} is no directory. Name one that does not exist.")
    if any(target.iterdir()):
        raise UsageError(
            f"--output-dir {target} is not empty, and nothing in it will be replaced. Name a"
            " directory that does not exist."
        )
    if target.samefile(Path.cwd()):
        # It would be replaced by another of the same name, and the shell stand in a deleted one.
        raise UsageError(
            f"--output-dir {target} is the current directory. Name one that does not exist."
        )
