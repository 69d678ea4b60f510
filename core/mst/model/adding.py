"""Putting a model into the place for models: copied with its hashes, or linked to."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mst.durable import copy_file, seal_directory, sha256, sync_directory, why_unwritten
from mst.errors import ModelError, RunError
from mst.model.files import read_config, read_header, weight_files
from mst.quantities import gib
from mst.seal.supply.listing import hashes_of
from mst.seal.supply.model_files import PICKLES, PROGRAMS, refuse_archive
from mst.seal.supply.standing import HashState, listing_of, remember, verify_model, write_listing

# A part of a name: what hubs allow, and no ".." in it.
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# Room beside the files' own: directories, the listing, and what others write meanwhile.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Added:
    """A model that was put into its place.

    Attributes:
        path: its directory there.
        listing: the file with its hashes.
        files: that it has.
        bytes: of them.
        left_out: names in the source that are not of the model, or could run code.
        hashes: how it stands.
    """

    path: Path
    listing: Path
    files: int
    bytes: int
    left_out: tuple[str, ...]
    hashes: HashState


def checked_name(name: str) -> str:
    """Return a name or an id ("org/name") under which a model may lie.

    Raises:
        ModelError: it is none.
    """
    parts = name.split("/")
    if len(parts) > 2 or not all(_PART.fullmatch(each) and ".." not in each for each in parts):
        raise ModelError(
            f"a model can't be called {name!a}. Take letters, digits, '.', '_' and '-', with one"
            " '/' at the most: NAME, or ORG/NAME."
        )
    return name


def add(
    source: Path,
    name: str | None,
    place: Path,
    link: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Added:
    """Copy a model's directory into a place for models, or link to it; its hashes lie beside it.

    Where the source came with hashes (`mst.seal.supply.standing`), it is verified first. Each copy
    is read again and compared with what was read of the source. It gets its name when it is whole.

    Args:
        source: with config.json and *.safetensors.
        name: under which it is to lie; None for the directory's own.
        place: the directory for models; made where it isn't there.
        link: leave the files where they are.
        tell: shown to the user before what takes long.

    Raises:
        ModelError: it is no model that can be used, has files that are not its own, is not what its
            hashes say, is there already, or there is no space.
        RunError: the place can't be written.
    """
    refuse_archive(source, f"mst models add {source}")
    if not source.is_dir():
        raise ModelError(
            f"mst models add {source}: {'a file' if source.exists() else 'nothing is there'}. Give"
            " the directory that holds config.json and *.safetensors; a .gguf file is used from"
            " where it lies: --model FILE."
        )
    called = checked_name(name or source.resolve().name)
    target = place / called
    read_config(source)
    for each in weight_files(source):  # refuses a model that is only pickled
        read_header(each)
    with claimed(target):
        if listing_of(source) is not None:
            tell("comparing the source with its hashes")
            verify_model(source)
        if link:
            return _linked(source, target, tell)
        return _copied(source, target, tell)


@contextmanager
def claimed(target: Path) -> Iterator[Path]:
    """Hold a model's place while the block makes it; yield the directory to make it in.

    Raises:
        ModelError: a model lies there already, or another process is making it.
        RunError: it can't be written there.
    """
    part = target.with_name(f".{target.name}.part")
    lock = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RunError(
            f"cannot write to {target.parent}: {error.strerror}. Pass --models-dir DIR, or set"
            " MST_MODELS, with a directory that can be written."
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelError(
                f"another process is putting a model to {target} at this moment. Wait for it."
            ) from None
        if target.exists() or target.is_symlink():
            raise ModelError(
                f"{target} is there already, and is never overwritten. `mst models verify` says"
                " whether it is whole; take another name, or remove it first."
            )
        if part.is_symlink():  # what it leads to would be emptied
            part.unlink()
        yield part
        lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def check_space(directory: Path, needed: int) -> None:
    """Make sure that a directory's disk has room.

    Raises:
        ModelError: it hasn't; says how much is missing.
    """
    free = shutil.disk_usage(directory).free
    if free < needed + _SPARE_BYTES:
        raise ModelError(
            f"{gib(needed)} are needed in {directory}, and {gib(free)} are free. Make room, or pass"
            " --models-dir DIR on another disk."
        )


def _linked(source: Path, target: Path, tell: Callable[[str], None]) -> Added:
    tell("listing its hashes")
    hashes = hashes_of(source)
    listing = write_listing(target, hashes)
    try:
        target.symlink_to(source.resolve())
        sync_directory(target.parent)
    except OSError as error:
        listing.unlink(missing_ok=True)
        raise RunError(f"cannot link {target}: {error.strerror}.") from None
    size = sum((source / each).stat().st_size for each in hashes)
    state = remember(target, "listing")
    return Added(target, listing, len(hashes), size, (), state)


def _copied(source: Path, target: Path, tell: Callable[[str], None]) -> Added:
    wanted, left_out = _of_the_model(source)
    size = sum(each.stat().st_size for each in wanted)
    part = target.with_name(f".{target.name}.part")
    check_space(target.parent, size)
    tell(f"copying {gib(size)}")
    listing = None
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        hashes = {each.name: _copy(each, part / each.name) for each in wanted}
        # Before the directory has its name: a listing alone says nothing of a model.
        listing = write_listing(target, hashes)
        seal_directory(part, target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if listing is not None and not target.exists():
            listing.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        reason = why_unwritten(error) or error.strerror
        raise ModelError(
            f"cannot copy {source} to {target}: {reason}. Nothing of it was kept."
        ) from None
    return Added(target, listing, len(hashes), size, left_out, remember(target, "listing"))


def _of_the_model(source: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Return the files to copy, and the names of what stays behind: pickles, code, directories."""
    wanted, left_out = [], []
    for each in sorted(source.iterdir()):
        runs = each.suffix.lower() in (*PICKLES, *PROGRAMS)
        if each.is_file() and not runs and not each.name.startswith("."):
            wanted.append(each)
        else:
            left_out.append(each.name)
    return wanted, tuple(left_out)


def _copy(source: Path, target: Path) -> str:
    """Copy a file and return its SHA-256.

    Raises:
        ModelError: what was written reads differently.
    """
    digest = copy_file(source, target)
    if sha256(target) != digest:
        raise ModelError(
            f"{target} reads differently from what was written. Check the disk; nothing was kept."
        )
    return digest
