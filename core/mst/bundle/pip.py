"""pip as a bundle is made with it: for another machine, and either as its user has set it up or
without any network.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from urllib.parse import urlsplit

from mst.bundle import target_pip
from mst.bundle.target import Target, marker_environment, platform_tags
from mst.errors import BundleError

_PLACES = ("index-url", "extra-index-url", "find-links", "proxy")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
# Behind it pip lists who asks for what.
_CONFLICT = "The conflict is caused by:"


@dataclass(frozen=True)
class Pip:
    """Where pip takes wheels from.

    Attributes:
        wheels: a directory, and nothing else; None for the index that pip is set to.
        constraints: file of exact versions, or None.
        environ: of the command.
    """

    wheels: Path | None
    constraints: Path | None
    environ: Mapping[str, str]


def target_options(target: Target) -> list[str]:
    """Return the options by which pip takes a target's wheels."""
    tags = [text for tag in platform_tags(target) for text in ("--platform", tag)]
    abi = "cp" + target.python.replace(".", "")
    return [
        "--only-binary=:all:", "--implementation", "cp", "--python-version", target.python,
        "--abi", abi, *tags,
    ]  # fmt: skip


def run_pip(
    pip: Pip, arguments: Sequence[str], what: str, target: Target | None = None, show: bool = False
) -> None:
    """Run pip once.

    Args:
        pip: where it takes wheels from.
        arguments: its command, and what it's about.
        what: it does, for an error.
        target: for which markers are read; None for this Python.
        show: pip's progress to the user.

    Raises:
        BundleError: it failed, in its own words and with what to do.
    """
    # -I: neither this directory's modules nor the working directory's are taken for pip's.
    started = [sys.executable, "-I", "-m", "pip"]
    if target is not None:
        markers = json.dumps(marker_environment(target))
        started = [sys.executable, "-I", str(Path(target_pip.__file__)), markers]
    command = [
        *started, *arguments, "--disable-pip-version-check", "--no-input", *_sources(pip),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, env=_environment(pip), stdout=None if show else subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", check=False,
        )  # fmt: skip
    except OSError as error:
        raise BundleError(f"cannot start pip: {error.strerror}.") from None
    if done.returncode != 0:
        raise BundleError(_why(what, (done.stdout or "") + done.stderr, pip, target))


def _sources(pip: Pip) -> list[str]:
    found = [] if pip.constraints is None else ["--constraint", str(pip.constraints)]
    if pip.wheels is not None:
        found += ["--no-index", "--find-links", str(pip.wheels.absolute())]
    return found


def _environment(pip: Pip) -> dict[str, str]:
    """Return pip's environment: the user's own, or one in which nothing names another place."""
    if pip.wheels is None:
        return dict(pip.environ)
    kept = {name: each for name, each in pip.environ.items() if not name.startswith("PIP_")}
    return kept | {"PIP_CONFIG_FILE": os.devnull}


def _why(what: str, output: str, pip: Pip, target: Target | None = None) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("Errno 28" in line for line in lines):
        return f"{what}: there is no space left. Free some, or set TMPDIR and --out elsewhere."
    if any("No module named pip" in line for line in lines):
        return f"{what}: this Python has no pip. Install it: {sys.executable} -m ensurepip"
    if _CONFLICT in lines:  # who asks for what, up to advice on pip itself
        begin = lines.index(_CONFLICT) + 1
        said = list(takewhile(lambda line: not line.startswith("To fix"), lines[begin : begin + 6]))
    else:
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
        said = errors[-2:] or lines[-2:]
    place = "the index that pip is set to" if pip.wheels is None else str(pip.wheels)
    words = " / ".join(said)[:600].rstrip(".")
    newer = ""
    if target is not None:
        newer = (
            f" Wheels that ask for a newer glibc than {target.glibc} are not taken: if that machine"
            " has one (ldd --version), name it by --platform."
        )
    return (
        f"{what}: {place} has no wheels that fit together; pip says: {words}."
        f"{newer}"
        " What has only sources there needs a wheel, built on a machine of that kind (python -m pip"
        " wheel --no-deps NAME --wheel-dir DIR) and found by PIP_FIND_LINKS=DIR or --wheels; or"
        " leave out the --extra that needs it."
    )


def configured_places(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the hosts and directories that pip is set to take packages from, without passwords.

    Nothing is contacted for this. pip's own default index stands there as "pip's default index".

    Raises:
        BundleError: pip does not run.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-m", "pip", "config", "list"],
        env=dict(environ), capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise BundleError(_why("reading pip's settings", done.stderr, Pip(None, None, environ)))
    found: list[str] = []
    indexed = False
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in _PLACES:
            indexed |= name == "index-url"
            # Written by repr: several places stand on lines of their own.
            found += [_place(each) for each in str(ast.literal_eval(value)).split()]
    proxies = [value for key, value in environ.items() if key.lower() in _PROXIES and value]
    first = [] if indexed else ["pip's default index"]
    return tuple(dict.fromkeys([*first, *found, *map(_place, proxies)]))


def _place(url: str) -> str:
    parts = urlsplit(url if "://" in url or url.startswith("/") else f"//{url}")
    return parts.hostname or parts.path
