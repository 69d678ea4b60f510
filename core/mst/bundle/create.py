"""Making a bundle: written aside, verified, and given its name when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import mst
from mst.bundle import install, wheels
from mst.bundle.bill import bill_text
from mst.bundle.guide import guide
from mst.bundle.models import ModelFiles, copy_model, find_models
from mst.bundle.own import CONSTRAINTS, checkout, own_wheel
from mst.bundle.pip import Pip, configured_places
from mst.bundle.target import Target, needed_target, platform_tag
from mst.bundle.verify import sign_sums, verify_bundle
from mst.durable import file_listing, seal_directory, sha256, why_unwritten
from mst.errors import BundleError, Interrupted
from mst.quantities import gib
from mst.rundir import now
from mst.seal.audit import record
from mst.seal.supply.signature import load_private_key

BILL = "sbom.cdx.json"
# The demo, a server, parquet files and 4-bit weights: all of these have wheels.
EXTRAS = ("demo", "serve", "data", "qlora")


@dataclass(frozen=True)
class BundleRequest:
    """What a bundle is to hold.

    Attributes:
        target: what it runs on.
        output: new directory.
        models: directories, GGUF files or names, as `--model` of mst train takes them.
        extras: of mst.
        packages: further distributions, such as a vendor's plugin.
        wheels: a directory with all wheels, and no network; None for the index of pip.
        source: a checkout of mst; None for the one that this mst runs from.
        sign: private key, PEM; None for no signature.
    """

    target: Target
    output: Path
    models: tuple[str, ...] = ()
    extras: tuple[str, ...] = EXTRAS
    packages: tuple[str, ...] = ()
    wheels: Path | None = None
    source: str | None = None
    sign: Path | None = None


@dataclass(frozen=True)
class BundleManifest:
    """What a bundle holds; lies in it as JSON, beside the listing that `sha256sum -c` reads.

    Attributes:
        format: of the bundle.
        created_by: "mst 0.1.0".
        created: UTC, ISO 8601.
        target: device, python, platform, arch, glibc.
        torch: its version and what it is built for.
        extras: of mst.
        packages: name, version and file of each wheel.
        models: name, path and bytes of each.
        installed_bytes: of what the wheels unpack to.
        constraints_sha256: of the file of exact versions; None where there was none.
        files: SHA-256 and bytes of every file but this one, the listing and its signature.
    """

    format: int
    created_by: str
    created: str
    target: Mapping[str, str]
    torch: Mapping[str, str]
    extras: tuple[str, ...]
    packages: tuple[Mapping[str, str], ...]
    models: tuple[Mapping[str, str | int], ...]
    installed_bytes: int
    constraints_sha256: str | None
    files: Mapping[str, Mapping[str, str | int]]


def create_bundle(
    request: BundleRequest, environ: Mapping[str, str], tell: Callable[[str, str], None]
) -> BundleManifest:
    """Make a bundle and return what it holds.

    pip uses the network, unless wheels were given; nothing else does. That is told first, and
    recorded.

    Args:
        request: what it is to hold.
        environ: of the command: pip's settings, and where models lie.
        tell: shows a line to the user: what, and what about it.

    Raises:
        MstError: it can't be made; nothing is left behind.
    """
    source = checkout(request.source)
    constraints = None if source is None else source / CONSTRAINTS
    if constraints is not None and not constraints.is_file():
        constraints = None
    pip = Pip(request.wheels, constraints, environ)
    models = _checked(request, environ)
    for model in models:
        if model.left_out:
            tell("left out", f"{', '.join(model.left_out)} of {model.name}: never read by mst")
    _tell_places(pip, tell)
    try:
        with _part(request.output) as part, tempfile.TemporaryDirectory() as work:
            manifest = _fill(request, pip, models, source, part, Path(work), tell)
            found = verify_bundle(part)
            seal_directory(part, request.output.absolute())
    except KeyboardInterrupt:
        raise Interrupted(f"{request.output} was not made, and nothing of it is left.") from None
    except OSError as error:
        why = why_unwritten(error) or error.strerror
        raise BundleError(
            f"{request.output} was not made: {why} ({error.filename or 'writing'}). Free some"
            " space, or pass --out on another disk. Nothing of it is left."
        ) from None
    record(
        "bundle.made",
        bundle=str(request.output.absolute()),
        target=dict(manifest.target),
        sums_sha256=found.sums_sha256,
        signed=found.signed,
    )
    return manifest


def _checked(request: BundleRequest, environ: Mapping[str, str]) -> tuple[ModelFiles, ...]:
    """Refuse what can be refused before anything is downloaded."""
    target = request.output.absolute()
    if os.path.lexists(target):
        raise BundleError(f"--out {target} exists and is never overwritten. Pass a new directory.")
    if request.sign is not None:
        load_private_key(request.sign)
    if request.wheels is not None and not any(request.wheels.glob("*.whl")):
        raise BundleError(f"--wheels {request.wheels} holds no *.whl. Give a directory with them.")
    models = find_models(request.models, environ)
    place = next(each for each in target.parents if each.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise BundleError(f"cannot write in {place}. Pass an --out that can be written.")
    needed = sum(each.size for each in models)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BundleError(
            f"the models take {gib(needed)}, and the wheels come on top; {place} has {gib(free)}"
            " free. Free some space, or pass --out on another disk."
        )
    return models


def _tell_places(pip: Pip, tell: Callable[[str, str], None]) -> None:
    if pip.wheels is not None:
        tell("network", f"none; wheels are taken from {pip.wheels}")
        return
    places = configured_places(pip.environ)
    tell("network", f"pip gets wheels, as it is set up: {', '.join(places)}")
    tell("", "it sends names of packages, and versions of Python and of this system; no data")
    record("bundle.network", places=list(places))


@contextlib.contextmanager
def _part(output: Path) -> Iterator[Path]:
    """Hold a new directory beside the output, and remove it if it is not given its name."""
    target = output.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.mkdir(exist_ok=True)
    # What a link leads to would be emptied.
    handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise BundleError(
            f"another mst bundle create is writing {output}. Wait for it, or pass another --out."
        ) from None
    try:
        for each in part.iterdir():  # of one that was killed
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(handle)


def _fill(
    request: BundleRequest,
    pip: Pip,
    models: Sequence[ModelFiles],
    source: Path | None,
    part: Path,
    work: Path,
    tell: Callable[[str, str], None],
) -> BundleManifest:
    (part / "wheels").mkdir()
    found = _wheels(request, pip, source, part, work, tell)
    read: dict[str, str] = {}
    for model in models:
        tell("model", f"{model.name}: {len(model.files)} files, {gib(model.size)}")
        read |= {
            f"models/{name}": each for name, each in copy_model(model, part / "models").items()
        }
    shutil.copyfile(str(install.__file__), part / "install.py")
    target = needed_target(request.target, (each.name for each in found))
    _write(part / "README.txt", guide(target, request.sign is not None))
    told = {f"wheels/{path.name}": each for path, each in found.items()}
    listing = file_listing(part)
    hashes = {name: str(each["sha256"]) for name, each in listing.items()}
    for name, digest in read.items():
        if hashes[name] != digest:
            raise BundleError(f"{name} was not written as it was read. Is the disk sound?")
    packages = tuple(
        {"name": wheel.name, "version": wheel.version, "file": path}
        for path, (wheel, _) in told.items()
    )
    _write(part / install.REQUIREMENTS, _requirements(packages, hashes))
    paths = [f"models/{each.name}" for each in models]
    metadata = {path: message for path, (_, message) in told.items()}
    _write(part / BILL, bill_text(metadata, paths, hashes))
    # All else is gigabytes, and was hashed above.
    for path in (part / install.REQUIREMENTS, part / BILL):
        listing[path.name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    torch = next(wheel for wheel, _ in told.values() if wheel.name == "torch")
    manifest = BundleManifest(
        format=install.FORMAT,
        created_by=f"mst {mst.__version__}",
        created=now(),
        target={
            "device": target.device, "python": target.python, "platform": platform_tag(target),
            "arch": target.arch, "glibc": target.glibc,
        },
        torch={"version": torch.version, "build": wheels.torch_build(torch, target)},
        extras=request.extras,
        packages=packages,
        models=tuple(
            {"name": each.name, "path": path, "bytes": each.size}
            for each, path in zip(models, paths, strict=True)
        ),
        installed_bytes=wheels.unpacked_bytes(found),
        constraints_sha256=None if pip.constraints is None else sha256(pip.constraints),
        files=listing,
    )  # fmt: skip
    _finish(part, manifest, request.sign)
    return manifest


def _wheels(
    request: BundleRequest,
    pip: Pip,
    source: Path | None,
    part: Path,
    work: Path,
    tell: Callable[[str, str], None],
) -> dict[Path, tuple[wheels.Wheel, Message]]:
    """Put every wheel and mst's sources into the bundle, and return what each wheel says."""
    place, target = part / "wheels", request.target
    wheel, archive = own_wheel(pip, source, place, work)
    if archive is not None:
        (part / "source").mkdir()
        archive.rename(part / "source" / archive.name)
    tell("wheels", f"choosing, for Python {target.python} on {platform_tag(target)}")
    chosen = wheels.resolve(pip, target, wheel, request.extras, request.packages, work)
    record("bundle.wheels", hosts=list(wheels.hosts(chosen)), wheels=len(chosen))
    tell("", f"{len(chosen)}, with torch {next(w.version for w in chosen if w.name == 'torch')}")
    found = wheels.download(pip, target, chosen, place, work)
    wheels.check_whole((each for each, _ in found.values()), target, request.extras)
    return found


def _requirements(packages: Sequence[Mapping[str, str]], hashes: Mapping[str, str]) -> str:
    """Return the file by which pip installs all but mst, and compares each hash once more."""
    return "".join(
        f"{each['name']}=={each['version']} --hash=sha256:{hashes[each['file']]}\n"
        for each in packages
        if each["name"] != "mst-train"
    )


def _finish(part: Path, manifest: BundleManifest, key: Path | None) -> None:
    """Write the manifest, then the listing that has it too, then the signature of the listing."""
    from mst import serial

    _write(part / install.MANIFEST, serial.dumps(manifest))
    listed = {name: str(each["sha256"]) for name, each in manifest.files.items()}
    listed[install.MANIFEST] = sha256(part / install.MANIFEST)
    _write(part / install.SUMS, "".join(f"{d}  {n}\n" for n, d in sorted(listed.items())))
    if key is not None:
        sign_sums(part, key)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
