"""Install mst from the bundle that this file lies in: nothing but Python is needed, and no network.

It is copied into each bundle, and imported by `mst bundle verify`, so that both check alike. An old
Python must be able to read it, to be told what it lacks: nothing newer than Python 3.6 is used.
"""

import os
import sys

if __name__ == "__main__":
    # Nothing beside this file is verified yet: no json.py there may be taken for Python's own.
    _HERE = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [each for each in sys.path if os.path.realpath(each) != _HERE]

import argparse
import contextlib
import fcntl
import hashlib
import json
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from typing import Any

MANIFEST, SUMS, SIGNATURE = "manifest.json", "SHA256SUMS", "SHA256SUMS.sig"
REQUIREMENTS = "requirements.txt"
FORMAT = 1
# In an environment that is not whole; a second try removes what has it.
UNFINISHED = ".mst-install-unfinished"
RECEIPT = "mst-bundle.json"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_MOST_BYTES = 64 << 20
_AGAIN = "Don't use this bundle; copy it again from where it was made."
# Bytecode beside the modules, and the scripts.
_SPARE = 1.3


class Refused(Exception):
    """Something a person can mend: what was asked, what was found, what to do."""


def main(argv: "list[str] | None" = None) -> int:
    """Verify the bundle, make an environment, and print what to type next.

    Returns:
        0 when mst is installed, 1 when something is refused, 130 when interrupted.
    """
    parser = argparse.ArgumentParser(
        description="Install mst from this bundle. Uses no network.", allow_abbrev=False
    )
    parser.add_argument("--to", default=".venv", metavar="DIR", help="new environment (.venv)")
    parser.add_argument(
        "--public-key", metavar="FILE", help="PEM; verify the signature with it first, by openssl"
    )
    parser.add_argument("--verify-only", action="store_true", help="verify, and install nothing")
    args = parser.parse_args(argv)
    root = os.path.dirname(os.path.abspath(__file__))
    try:
        if args.public_key is not None:
            check_signature(root, args.public_key)
            say("signature", "is of the key " + args.public_key)
        manifest = check_files(root)
        say("verified", "{} files, each as listed".format(len(manifest["files"]) + 1))
        if not args.verify_only:
            install(root, args.to, manifest)
    except Refused as error:
        sys.stderr.write(f"Refused: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(
            f"Refused: {error.filename or 'the disk'}: {error.strerror}. Nothing is installed.\n"
        )
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. Nothing is installed; type the same again.\n")
        return 130
    return 0


def say(what: str, text: str) -> None:
    """Print a line at once."""
    print(f"{what:<10} {text}", flush=True)


def check_signature(root: str, public_key: str) -> None:
    """Make sure by openssl that the listing is signed by a key's owner.

    Raises:
        Refused: it isn't, or there is no openssl.
    """
    for name, path in (("--public-key", public_key), (SIGNATURE, os.path.join(root, SIGNATURE))):
        if not os.path.isfile(path):
            raise Refused(
                f"{name} is no file ({path}). A bundle is signed by `mst bundle create --sign KEY`;"
                " without --public-key, only its hashes are verified."
            )
    openssl = shutil.which("openssl")
    if openssl is None:
        raise Refused(
            "--public-key is verified by openssl, which is not installed here, and Python's library"
            " has no signatures. Install Debian's or your system's openssl; or verify the bundle on"
            " a machine that has it: `mst bundle verify DIR --public-key FILE`."
        )
    done = subprocess.run(
        [
            openssl,
            "dgst",
            "-sha256",
            "-verify",
            public_key,
            "-signature",
            os.path.join(root, SIGNATURE),
            os.path.join(root, SUMS),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        raise Refused(not_signed(root, public_key))


def not_signed(root: str, public_key: str) -> str:
    """Return the words for a signature that does not hold."""
    return (
        f"{os.path.join(root, SIGNATURE)} does not sign {SUMS} with the key {public_key}: one of"
        " the three was changed, or is another's."
        f" {_AGAIN}"
    )


def check_files(root: str) -> "dict[str, Any]":
    """Compare every file with the listing, and return the manifest.

    Raises:
        Refused: one differs, is missing or is not listed, and is named.
    """
    listed = read_sums(root)
    found = _files(root)
    wrong = [name + " is missing" for name in listed if name not in found]
    wrong += [name + " is not listed" for name in found if name not in listed]
    if not wrong:
        wrong = [
            name + " differs from its SHA-256"
            for name, digest in listed.items()
            if _sha256(os.path.join(root, name)) != digest
        ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise Refused("{}: {}{}. {}".format(root, ", ".join(sorted(wrong)[:3]), more, _AGAIN))
    return _manifest(root, listed)


def read_sums(root: str) -> "dict[str, str]":
    """Return the SHA-256 of each file of a bundle, by its path in it, as the listing says.

    Raises:
        Refused: there is no such listing, or it is damaged.
    """
    path = os.path.join(root, SUMS)
    if not os.path.isfile(path):
        raise Refused(
            f"{root} has no {SUMS}, so it is no whole bundle. `mst bundle create` writes it last;"
            " copy the bundle again."
        )
    listed = {}  # type: dict[str, str]
    with open(path, "rb") as file:
        raw = file.read(_MOST_BYTES)
    for number, line in enumerate(raw.decode("utf-8", "replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        name = match.group(2) if match else ""
        outside = os.path.isabs(name) or ".." in name.split("/") or not name.isprintable()
        if match is None or outside or name in listed:
            raise Refused(f"{path} is damaged in line {number}. {_AGAIN}")
        listed[name] = match.group(1)
    if MANIFEST not in listed:
        raise Refused(f"{path} does not list {MANIFEST}. {_AGAIN}")
    return listed


def _files(root: str) -> "list[str]":
    """Return the paths of all files but the listing and its signature.

    Raises:
        Refused: one is a link, a device or a pipe, or has a name that would steer a terminal.
        OSError: a directory can't be looked into.
    """

    def stop(error: OSError) -> None:
        raise error

    found = []  # type: list[str]
    for folder, folders, names in os.walk(root, onerror=stop):
        for name in folders + names:
            path = os.path.join(folder, name)
            shown = os.path.relpath(path, root)
            plain = os.path.isfile(path) or os.path.isdir(path)
            if os.path.islink(path) or not plain or not shown.isprintable():
                raise Refused(f"{root}: {shown!a} is no plain file. {_AGAIN}")
            if name in names and shown not in (SUMS, SIGNATURE):
                found.append(shown)
    return found


def _sha256(path: str) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while True:
            block = file.read(1 << 22)
            if not block:
                return hasher.hexdigest()
            hasher.update(block)


def _manifest(root: str, listed: "dict[str, str]") -> "dict[str, Any]":
    path = os.path.join(root, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)  # type: dict[str, Any]
        if manifest["format"] != FORMAT:
            raise Refused(
                "{} has format {}; this reads {}. Use the install.py of the same bundle.".format(
                    path, manifest["format"], FORMAT
                )
            )
        hashes = {name: each["sha256"] for name, each in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refused(f"{path} is not what `mst bundle create` writes. {_AGAIN}") from None
    if hashes != {name: each for name, each in listed.items() if name != MANIFEST}:
        raise Refused(f"{path} and {SUMS} disagree. {_AGAIN}")
    return manifest


def check_machine(target: "dict[str, Any]") -> None:
    """Make sure that the bundle's wheels run on this machine and this Python.

    Args:
        target: of the manifest.

    Raises:
        Refused: they don't; names what is asked for and what is here.
    """
    asked = (
        "this bundle is for CPython {python} on Linux with glibc {glibc} or later, {arch}".format(
            **target
        )
    )
    make = " On a connected machine: mst bundle create {}."
    glibc = _glibc()
    if not sys.platform.startswith("linux"):
        raise Refused(f"{asked}; this is {sys.platform}. Install it on Linux.")
    arch = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine(), platform.machine())
    if arch != target["arch"] or sys.maxsize < 2**32:
        bits = "" if sys.maxsize > 2**32 else " with a Python of 32 bits"
        raise Refused(
            f"{asked}; this machine is {arch}{bits}."
            + make.format("--platform " + _platform(arch, glibc))
        )
    if glibc is None:
        raise Refused(
            asked + "; this system has no glibc (musl?), and torch has no wheels for it. Use a"
            " system with glibc, such as Debian, Ubuntu, RHEL, openEuler or Kylin."
        )
    if _numbers(glibc) < _numbers(target["glibc"]):
        raise Refused(
            f"{asked}; this system has glibc {glibc}. Use a newer system, or make a bundle for"
            " this one." + make.format("--platform " + _platform(arch, glibc))
        )
    here = "{}.{}".format(*sys.version_info[:2])
    kind = platform.python_implementation()
    threads = " without the GIL" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    if (kind, here, threads) != ("CPython", target["python"], ""):
        other = shutil.which("python" + target["python"])
        advice = (
            f" Type: {other} install.py"
            if other
            else " Install Python {}, or make a bundle for this one.".format(target["python"])
            + make.format("--python " + here)
        )
        raise Refused(f"{asked}; this is {kind} {here}{threads}.{advice}")


def _platform(arch: str, glibc: "str | None") -> str:
    """Return what `mst bundle create` calls a machine."""
    return "manylinux_{}_{}_{}".format(*_numbers(glibc or "2.34"), arch)


def _glibc() -> "str | None":
    try:
        words = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (ValueError, OSError):
        return None
    return words[1] if len(words) == 2 and words[0] == "glibc" else None


def _numbers(version: str) -> "list[int]":
    return [int(each) for each in re.findall(r"[0-9]+", version)[:2]]


def install(root: str, to: str, manifest: "dict[str, Any]") -> None:
    """Make an environment at `to` with every wheel of a verified bundle.

    Raises:
        Refused: it is the wrong machine, there is no space, something is there already, or pip
            fails. What was begun is removed.
    """
    check_machine(manifest["target"])
    place = os.path.abspath(to)
    if os.path.realpath(place).startswith(os.path.join(os.path.realpath(root), "")):
        raise Refused(
            f"--to {place} lies in the bundle, which stays as it was verified. Pass another --to,"
            " such as /opt/mst/.venv."
        )
    above = _above(place)
    if not os.access(above, os.W_OK):
        raise Refused(f"cannot write in {above}. Pass --to where you may write.")
    with _held(place) as lock:
        _check_space(place, int(manifest["installed_bytes"] * _SPARE))
        _fill(root, place, manifest, lock)
    _say_next(root, place, manifest)


@contextlib.contextmanager
def _held(place: str) -> "Iterator[int]":
    """Hold the directory of an environment that nobody else fills; remove it if that fails.

    Yields:
        A handle that is locked. What fills the environment inherits it, so that a killed
        installer's pip keeps others out until it has ended too.

    Raises:
        Refused: another installer is at it, or something is there already.
    """
    taken = f"--to {place} exists and is left as it is. Pass another --to."
    other = f"another install.py is installing into {place}. Wait for it, or pass another --to."
    os.makedirs(os.path.dirname(place), exist_ok=True)
    try:
        os.mkdir(place)
    except FileExistsError:
        if os.path.islink(place) or not os.path.isdir(place):
            raise Refused(taken) from None
    handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(other) from None
        if not os.path.isdir(place) or not os.path.samestat(os.fstat(handle), os.stat(place)):
            raise Refused(other)  # it failed, and took its directory away
        if os.listdir(place) and not os.path.lexists(os.path.join(place, UNFINISHED)):
            raise Refused(taken)
        with open(os.path.join(place, UNFINISHED), "w") as file:
            file.write("mst is being installed here\n")
        try:
            _empty(place)  # of one that was killed
            yield handle
        except BaseException:
            _empty(place)
            shutil.rmtree(place, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _empty(place: str) -> None:
    """Remove all but what says that an environment is not whole, which goes last."""
    for each in os.scandir(place):
        if each.is_dir(follow_symlinks=False):
            shutil.rmtree(each.path, ignore_errors=True)
        elif each.name != UNFINISHED:
            os.unlink(each.path)


def _above(place: str) -> str:
    """Return the nearest directory above a place that is there."""
    above = os.path.dirname(place)
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    return above


def _check_space(place: str, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed:
        raise Refused(
            f"the environment takes about {needed / 2**30:.1f} GiB; {_above(place)} has"
            f" {free / 2**30:.1f} GiB free. Free some space, or pass --to on another disk."
        )


def _fill(root: str, place: str, manifest: "dict[str, Any]", lock: int) -> None:
    import venv

    # pip comes from the bundle: Debian's Python has none of its own (python3-venv).
    venv.EnvBuilder(symlinks=True, with_pip=False).create(place)
    python = os.path.join(place, "bin", "python")
    wheels = os.path.join(root, "wheels")
    files = {each["name"]: each["file"] for each in manifest["packages"]}
    say("install", f"{len(files)} packages into {place}")
    pip = [python, "-I", os.path.join(root, files["pip"], "pip"), "install", "--no-index"]
    pip += ["--find-links", wheels, "--no-deps", "--no-cache-dir", "--quiet", "--no-input"]
    pip += ["--disable-pip-version-check"]
    listed = os.path.join(root, REQUIREMENTS)
    _run([*pip, "--require-hashes", "--requirement", listed], "pip", lock)
    # Last, so that there is no `mst` in an environment that lacks something.
    _run([*pip, os.path.join(root, files["mst-train"])], "pip", lock)
    # What is imported at last tells whether the wheels fit this machine.
    check = "import mst.cli" + ("" if manifest["target"]["device"] == "ascend" else ", torch")
    _run([python, "-I", "-c", check], "the new environment", lock)
    shutil.copyfile(os.path.join(root, MANIFEST), os.path.join(place, RECEIPT))
    os.unlink(os.path.join(place, UNFINISHED))


def _run(command: "list[str]", what: str, lock: int) -> None:
    # Whatever pip is set to on this machine, it takes the bundle's wheels and nothing else.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    kept.update({"PIP_CONFIG_FILE": os.devnull, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    done = subprocess.run(command, env=kept, stderr=subprocess.PIPE, pass_fds=(lock,))
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        full = " There is no space left." if any("Errno 28" in each for each in words) else ""
        raise Refused(
            "{} failed with code {}: {}.{} Nothing is installed.".format(
                what, done.returncode, " / ".join(words[-3:])[:600], full
            )
        )


def _say_next(root: str, place: str, manifest: "dict[str, Any]") -> None:
    target = manifest["target"]
    say("installed", place)
    mst = shlex.quote(os.path.join(place, "bin", "mst"))
    activate = shlex.quote(os.path.join(place, "bin", "activate"))
    say("to use it", f". {activate}    (then `mst` is a command; alone, it opens the menu)")
    models = [os.path.join(root, each["path"]) for each in manifest["models"]]
    for each in models:
        say("model", each)
    if target["device"] == "cuda" and not os.path.exists("/dev/nvidiactl"):
        say("note", "no NVIDIA driver is seen here; the driver is not part of a bundle")
    if target["device"] == "ascend" and "ASCEND_HOME_PATH" not in os.environ:
        say("note", "CANN is no part of a bundle: source its set_env.sh before the next command")
    if models and "demo" not in manifest["extras"]:
        say("next", f"{mst} train --model {shlex.quote(models[0])} --dataset DATA")
    elif "demo" in manifest["extras"]:
        say("next", mst + " train --device auto")
    else:
        say("next", mst + " doctor")


if __name__ == "__main__":
    sys.exit(main())
