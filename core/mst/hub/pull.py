"""Pulling a model from a hub: asked for by a person, kept to named hosts, checked, and recorded."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mst.durable import seal_directory, sha256, why_unwritten, write_text
from mst.errors import JailError, ModelError, MstError, UsageError
from mst.hub.asking import Hub, Progress, asking, proxies_not_named
from mst.hub.source import MODELSCOPE, HubFile, Listing, endpoint_of, left_out, wanted
from mst.hub.worker import Asked, ToFetch, Wanted
from mst.model.adding import Added, check_space, checked_name, claimed
from mst.model.facts import read_config, read_header, weight_files
from mst.rundir import now
from mst.seal.audit import record
from mst.seal.jail import words
from mst.seal.supply.standing import git_hash, remember, write_listing

# Where a pulled model says where it came from.
SOURCE = "mst-source.json"
# A name, or an address of IPv4 or IPv6.
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class Order:
    """What a person asked to be pulled.

    Attributes:
        repository: "org/name".
        hub: of `mst.hub.source.HUBS`.
        endpoint: its address.
        host: in that address.
        revision: None for the hub's default.
        allow_hosts: further hosts that it may send us to.
        token: of a user's account there; None for none.
    """

    repository: str
    hub: str
    endpoint: str
    host: str
    revision: str | None
    allow_hosts: tuple[str, ...]
    token: str | None = field(default=None, repr=False)


def order(
    repository: str,
    hub: str,
    endpoint: str | None,
    revision: str | None,
    allow_hosts: tuple[str, ...],
    token: str | None,
    environ: Mapping[str, str],
) -> Order:
    """Return what is asked for, checked before anything is sent.

    Raises:
        UsageError: it names no repository, host or revision, or this machine is to stay offline.
        JailError: this process is in a jail.
    """
    if words.VARIABLE in environ:
        raise JailError("mst models pull talks to a hub, and nothing in a jail may. Type it alone.")
    if on := next((each for each in _OFFLINE if _is_on(environ.get(each, ""))), None):
        raise UsageError(
            f"mst models pull: {on} is set, so this machine is to stay offline. Unset it for this"
            f" one command: env -u {on} mst models pull …"
        )
    checked_name(repository)
    if "/" not in repository:
        raise UsageError(f"mst models pull {repository}: give the hub's whole name, ORG/NAME.")
    if revision is not None and (not revision.isprintable() or ".." in revision):
        raise UsageError("--revision takes a branch, a tag or a commit of the repository.")
    if hub == MODELSCOPE and importlib.util.find_spec("modelscope_hub") is None:
        raise UsageError(
            "mst models pull --from modelscope needs modelscope-hub, which is not installed here."
            " Install it: python -m pip install 'mst-train[hub]'"
        )
    address, host = endpoint_of(hub, endpoint)
    for each in allow_hosts:
        if not _HOST.fullmatch(each):
            raise UsageError(
                f"--allow-host takes the name of one host, not {each!a}. Leave out scheme and port."
            )
    hosts = tuple(each.lower() for each in allow_hosts)
    return Order(repository, hub, address, host, revision, hosts, token)


def _is_on(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")


def pull(
    asked: Order,
    place: Path,
    environ: Mapping[str, str],
    tell: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> Added:
    """Fetch a model into a place for models, and return where it lies.

    What was fetched is kept when it is interrupted, and the same call goes on. Each file is
    compared with the hash that the hub lists; the directory gets its name when all are equal.

    Args:
        asked: from `order`.
        place: the directory for models.
        environ: the process's environment.
        tell: shown to the user before each part.
        progress: told how many bytes of a file are there.

    Raises:
        ModelError: there is no such model, it is not of safetensors, there is no space, or a file
            is not what the hub lists.
        HostNotNamed: the hub sends us to a host that was not named, or to one without encryption;
            nothing was asked there.
        RunError: the place can't be written.
    """
    target = place / asked.repository
    facts = {"hub": asked.hub, "host": asked.host, "repository": asked.repository}
    record("pull.begun", **facts, revision=asked.revision, allow_hosts=list(asked.allow_hosts))
    try:
        with claimed(target) as part:
            return _pulled(asked, target, part, environ, tell, progress)
    except MstError as error:
        record("pull.failed", **facts, error=type(error).__name__)
        raise


def _pulled(
    asked: Order,
    target: Path,
    part: Path,
    environ: Mapping[str, str],
    tell: Callable[[str], None],
    progress: Progress | None,
) -> Added:
    hosts = (asked.host, *asked.allow_hosts)
    question = Asked(
        asked.hub, asked.endpoint, asked.repository, asked.revision, hosts, asked.token
    )
    for name, proxy in proxies_not_named(question, environ).items():
        tell(f"the proxy {proxy} of {name} is not used; --allow-host {proxy} uses it")
    try:
        with asking(question, environ) as hub:
            tell(f"asking {asked.host} for {asked.repository}")
            listing = hub.listing()
            files = wanted(listing.files, asked.repository)
            _check_hashes(files, asked)
            _tell_listing(listing, files, tell)
            part.mkdir(exist_ok=True)
            hashes = _fetched(hub, listing, files, part, progress)
        return _named(asked, listing, files, hashes, target, part)
    except OSError as error:
        reason = why_unwritten(error) or error.strerror
        raise ModelError(
            f"cannot write to {part}: {reason}. Make room; the same command goes on."
        ) from None


def _tell_listing(
    listing: Listing, files: tuple[HubFile, ...], tell: Callable[[str], None]
) -> None:
    size = sum(each.bytes for each in files)
    licence = f", licence {listing.licence}" if listing.licence.isprintable() else ""
    tell(f"revision {listing.revision[:40]}: {len(files)} files, {size} bytes{licence}")
    record("pull.listed", revision=listing.revision[:80], files=len(files), bytes=size)


def _named(
    asked: Order,
    listing: Listing,
    files: tuple[HubFile, ...],
    hashes: dict[str, str],
    target: Path,
    part: Path,
) -> Added:
    """Write down where the files came from, and give the directory its name."""
    source = {
        "hub": asked.hub, "endpoint": asked.endpoint, "repository": asked.repository,
        "revision": listing.revision, "pulled": now(), "licence": listing.licence,
    }  # fmt: skip
    write_text(part / SOURCE, json.dumps(source, indent=2) + "\n")
    hashes[SOURCE] = sha256(part / SOURCE)
    _check_model(part)
    listed = write_listing(target, dict(sorted(hashes.items())))
    seal_directory(part, target)
    record("pull.ended", path=str(target), files=len(hashes), listing_sha256=sha256(listed))
    size = sum(each.bytes for each in files)
    left = left_out(listing.files, files)
    return Added(target, listed, len(hashes), size, left, remember(target, "listing"))


def _check_hashes(files: tuple[HubFile, ...], asked: Order) -> None:
    for each in files:
        if not each.sha256 and not each.git_sha1:
            raise ModelError(
                f"{asked.host} lists no hash of {each.name}, so nobody could tell whether it came"
                " whole. Pull from a hub that lists them, or copy the model here yourself."
            )


def _fetched(
    hub: Hub,
    listing: Listing,
    files: tuple[HubFile, ...],
    part: Path,
    progress: Progress | None,
) -> dict[str, str]:
    """Fetch what is not there yet, and return each file's SHA-256."""
    hashes: dict[str, str] = {}
    missing = []
    for each in files:
        path = part / each.name
        digest = _digest_if_right(path, each) if path.is_file() else None
        if digest is None:
            missing.append(each)
        else:
            hashes[each.name] = digest
    _forget_others(part, files, missing)
    have = sum(
        _part_of(part, each).stat().st_size for each in missing if _part_of(part, each).exists()
    )
    check_space(part, sum(each.bytes for each in missing) - have)
    # The largest first: it lies on another host, if any does, and whether that may be asked is
    # better known at once.
    missing.sort(key=lambda each: -each.bytes)
    parts = {each.name: _part_of(part, each) for each in missing}
    fetch = tuple(Wanted(each.name, each.bytes, str(parts[each.name])) for each in missing)
    by_name = {each.name: each for each in missing}
    for name in hub.fetch(ToFetch(listing.revision, fetch), progress):
        each = by_name[name]
        digest = _digest_if_right(parts[name], each)
        if digest is None:
            parts[name].unlink(missing_ok=True)
            record("pull.refused", name=name, reason="hash")
            raise ModelError(
                f"{name} of {listing.revision[:12]} is not what the hub lists: its hash differs. It"
                " was removed. Run the command again; if it differs again, don't use this hub."
            )
        parts[name].replace(part / name)
        hashes[name] = digest
        record("pull.file", name=name, bytes=each.bytes, sha256=digest)
    return hashes


def _part_of(part: Path, file: HubFile) -> Path:
    # Named by the content that it is to have, so that no other revision's is added to.
    return part / f".{file.name}.{(file.sha256 or file.git_sha1)[:16]}.part"


def _forget_others(part: Path, files: tuple[HubFile, ...], missing: list[HubFile]) -> None:
    """Remove what an earlier call fetched of another revision."""
    kept = {each.name for each in files if each not in missing}
    kept |= {_part_of(part, each).name for each in missing}
    for path in part.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _digest_if_right(path: Path, file: HubFile) -> str | None:
    """Return a file's SHA-256 when it is what the hub lists, else None."""
    if path.stat().st_size != file.bytes:
        return None
    digest = sha256(path)
    if file.sha256:
        return digest if digest == file.sha256 else None
    return digest if git_hash(path) == file.git_sha1 else None


def _check_model(directory: Path) -> None:
    """Make sure that what was fetched can be read as a model.

    Raises:
        ModelError: it can't; it keeps no name under which it would be found.
    """
    read_config(directory)
    for each in weight_files(directory):
        read_header(each)
