"""How a model on this machine stands: are its files listed with hashes, and when did they hold?"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mst.durable import sha256, write_text
from mst.errors import ModelError, RunError, UsageError
from mst.seal.supply.listing import hashes_of, listing_text, verify_listing

LISTING_SUFFIX = ".sha256"
_INSIDE = "SHA256SUMS"
_SHA256, _SHA1 = 64, 40


@dataclass(frozen=True)
class HashState:
    """What is known of a model's hashes.

    Attributes:
        source: what has them: "listing" (a file beside the model), "cache" (a hub's cache, which
            names each file by its hash), "signature" (it was verified with one), or "" for nothing.
        verified: when all files were last compared with them and were equal, in UTC; "" for never.
        changed: a file was written, added or removed since.
    """

    source: str = ""
    verified: str = ""
    changed: bool = False


def listing_of(directory: Path) -> Path | None:
    """Return the listing of a model's hashes: DIR.sha256 beside it, or SHA256SUMS in it."""
    whole = directory.absolute()
    for each in (whole.with_name(whole.name + LISTING_SUFFIX), directory / _INSIDE):
        if each.is_file():
            return each
    return None


def write_listing(directory: Path, hashes: Mapping[str, str]) -> Path:
    """Write a model's hashes beside it, as DIR.sha256, and return that path.

    Raises:
        RunError: it can't be written.
    """
    whole = directory.absolute()
    path = whole.with_name(whole.name + LISTING_SUFFIX)
    try:
        write_text(path, listing_text(hashes))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}.") from None
    return path


def hash_state(model: Path) -> HashState:
    """Return how a model stands; no weight is read."""
    source = "listing" if listing_of(model) is not None else ""
    if not source and _is_snapshot(model):
        source = "cache"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(_record_of(model).read_text(encoding="utf-8"))
        changed = kept["stamp"] != _stamp(model)
        return HashState(source or str(kept["source"]), str(kept["verified"]), changed)
    return HashState(source)


def remember(model: Path, source: str) -> HashState:
    """Record that a model's files have been compared with their hashes and are equal.

    Args:
        model: its directory.
        source: as in `HashState`.

    Returns:
        How it stands. A state directory that can't be written leaves it at that.
    """
    from mst.rundir import now

    state = HashState(source, now())
    path = _record_of(model)
    kept = {key: value for key, value in asdict(state).items() if key != "changed"}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept |= {"path": str(model.resolve()), "stamp": _stamp(model)}
        write_text(path, json.dumps(kept) + "\n", 0o600)
    return state


def verify_model(directory: Path) -> tuple[int, HashState]:
    """Compare a model's files with the hashes that it came with, and remember the result.

    Returns:
        How many files were compared, and how the model stands.

    Raises:
        ModelError: one differs, is missing or is not listed.
        UsageError: it came without hashes.
    """
    listing = listing_of(directory)
    if listing is not None:
        return verify_listing(directory, listing), remember(directory, "listing")
    if _is_snapshot(directory):
        return _verify_snapshot(directory), remember(directory, "cache")
    raise UsageError(
        f"{directory} came without hashes: there is no {directory.name}{LISTING_SUFFIX} beside it"
        f" and no {_INSIDE} in it. Compare it with its source's, by --manifest FILE or --signature"
        " FILE; or, if you trust what is there, list it from here on: mst models manifest"
        f" {shlex.quote(str(directory))} --output"
        f" {shlex.quote(f'{directory.absolute()}{LISTING_SUFFIX}')}"
    )


def _is_snapshot(directory: Path) -> bool:
    """Return whether a directory is of a hub's cache, whose files are links to hashes."""
    home = directory.resolve()
    if home.parent.name != "snapshots" or not home.parent.parent.name.startswith("models--"):
        return False
    with suppress(OSError):
        links = [each for each in os.scandir(home) if each.is_symlink()]
        return bool(links) and len(links) == len(os.listdir(home))
    return False


def _verify_snapshot(directory: Path) -> int:
    """Return how many files of a hub's cache have the hash that names them.

    Large files are named by SHA-256, small ones by git's hash of their blob (SHA-1), which shows a
    damaged copy but not every forged one.

    Raises:
        ModelError: one has another hash, or no hash for a name.
    """
    names = hashes_of(directory)
    for name, digest in names.items():
        blob = (directory / name).resolve()
        expected = blob.name
        if len(expected) not in (_SHA256, _SHA1):
            raise ModelError(
                f"{directory / name} leads to {blob.name}, whose name is no hash, so nothing says"
                " what it should be. Remove it, or copy the model again from the source."
            )
        found = digest if len(expected) == _SHA256 else git_hash(blob)
        if found != expected:
            raise ModelError(
                f"{directory / name} is not what the hub's cache says: its hash is {found}."
                " Don't use it; copy the model again from the source."
            )
    return len(names)


def git_hash(path: Path) -> str:
    """Return git's name of a file's content: SHA-1 of its length and its bytes.

    Source: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
    """
    hasher = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def _record_of(model: Path) -> Path:
    import platformdirs

    name = hashlib.sha256(os.fsencode(model.resolve())).hexdigest()[:32]
    return platformdirs.user_state_path("mst") / "models" / f"{name}.json"


def _stamp(model: Path) -> str:
    """Return what changes when a file of a model is written, added or removed."""
    lines = []
    for each in sorted(model.rglob("*")) if model.is_dir() else [model]:
        about = each.stat()
        lines.append(f"{each.relative_to(model)} {about.st_size} {about.st_mtime_ns}")
    listing = listing_of(model)
    lines.append("" if listing is None else sha256(listing))
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
