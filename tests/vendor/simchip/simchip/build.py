"""The driver library: where it lies, and how g++ makes it from `csrc` and torch's headers.

python -m simchip.build      # prints the path; compiles for about 15 s the first time
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wall")


class BuildError(RuntimeError):
    """The driver library can't be made here."""


def compiler() -> str:
    """Return the command of the C++ compiler: $CXX, else g++."""
    return os.environ.get("CXX") or "g++"


def library_path() -> Path:
    """Return where the driver library for the installed torch lies, whether or not it is built.

    Reads torch's version from its metadata, not by importing it.

    Raises:
        importlib.metadata.PackageNotFoundError: torch is not installed.
    """
    torch_version = importlib.metadata.version("torch")
    key = hashlib.sha256(repr((torch_version, compiler(), FLAGS, platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return _directory() / f"libsimchip-torch{torch_version}-{key.hexdigest()[:16]}.so"


def build() -> Path:
    """Return the driver library's path, after compiling it unless it is there.

    Two builds at once do no harm: each writes a file of its own, and the last one to be done
    replaces the other's.

    Raises:
        BuildError: there is no compiler, or it failed; the message has its last words.
    """
    target = library_path()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=target.parent, prefix=".part-", suffix=".so")
    os.close(handle)
    try:
        _compile(Path(part))
        os.replace(part, target)
    finally:
        Path(part).unlink(missing_ok=True)
    return target


def _compile(target: Path) -> None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("simchip is compiled against torch, and torch is not installed")
    torch = Path(spec.origin).parent
    # As system headers, torch's own warnings are not shown. No rpath: torch's libraries are in the
    # process before this one is loaded.
    headers = (torch / "include", torch / "include/torch/csrc/api/include")
    command = [compiler(), *FLAGS]
    for each in headers:
        command += ["-isystem", str(each)]
    command += [str(SOURCES / "simchip.cpp"), "-o", str(target)]
    command += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(
            f"simchip needs the C++ compiler {compiler()!r}, which can't be run: {error}. Install"
            " g++ (Debian: apt install g++), or name another one in CXX."
        ) from None
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-20:])
        raise BuildError(f"{compiler()} could not compile simchip:\n{last}")


def _directory() -> Path:
    chosen = os.environ.get("SIMCHIP_BUILD_DIR")
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "simchip"


if __name__ == "__main__":
    try:
        print(build())
    except (BuildError, importlib.metadata.PackageNotFoundError) as failure:
        sys.exit(str(failure))
