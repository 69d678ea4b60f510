"""A directory that appears under its name only when it is whole, with a manifest of hashes."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mst.durable import file_listing, seal_directory
from mst.errors import TrainingError
from mst.seal.container.cipher import derived
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.training.tensor_files import ENDING

MANIFEST = "manifest.json"


def write_sealed(target: Path, fill: Callable[[Path], None], keys: KeyRing = NO_KEYS) -> None:
    """Make directory `target` with what `fill` writes and a manifest of hashes, or not at all.

    Args:
        target: a directory; one that is there is replaced.
        fill: writes into the directory that it is given.
        keys: of an encrypted run, by which the manifest is authenticated.

    Raises:
        TrainingError: it can't be written; the partial copy is removed.
    """
    with whole_or_absent(target) as part:
        empty(part)
        fill(part)
        seal(part, target, keys)


@contextlib.contextmanager
def whole_or_absent(target: Path) -> Iterator[Path]:
    """Give the directory that becomes `target` when it is sealed, and remove it when that fails.

    Raises:
        TrainingError: it can't be written.
    """
    from safetensors import SafetensorError

    part = target.with_name(f".{target.name}.part")
    try:
        yield part
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise TrainingError(
            f"cannot write {target}: {reason}. Earlier checkpoints are untouched."
            " Free some space (or fix the directory's permissions), then run the same command"
            " with --resume."
        ) from None


def empty(part: Path) -> None:
    """Make a directory, without what a killed save may have left there."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def seal(part: Path, target: Path, keys: KeyRing) -> None:
    """Add the manifest, bring all of it to the disk, and give the directory its name."""
    if keys.key_files:
        _refuse_plain(part)
    listing = file_listing(part)
    text = json.dumps({"files": listing, **manifest_mac(target.name, listing, keys)}, indent=2)
    (part / MANIFEST).write_text(text, encoding="utf-8")
    if target.exists():
        remove(target)
    seal_directory(part, target)


def _refuse_plain(part: Path) -> None:
    """Raise TrainingError when tensors lie in the clear: a library has another way to write."""
    plain = sorted(part.rglob(f"*{ENDING}"))
    if plain:
        shutil.rmtree(part, ignore_errors=True)
        raise TrainingError(
            f"{plain[0].name} was written unencrypted, which --encrypt-run must not do, and was"
            " removed again. This version of transformers or peft is not one that mst knows:"
            " install those of constraints.txt, and report this."
        )


def manifest_mac(name: str, listing: Mapping[str, Any], keys: KeyRing) -> dict[str, str]:
    """Return what authenticates a manifest in an encrypted run; nothing in a plain one.

    Each encrypted file is authentic by itself. This binds them to each other, to the plain files
    beside them and to their directory's name: none can be put in from another checkpoint.
    """
    if not keys.key_files:
        return {}
    key = derived(keys.key_files[0], name.encode(), b"manifest")
    text = json.dumps(listing, sort_keys=True).encode()
    return {"hmac": hmac.new(key, text, hashlib.sha256).hexdigest()}


def remove(target: Path) -> None:
    """Delete a checkpoint so that a crash on the way can't leave a part of it under its name."""
    trash = target.with_name(f".{target.name}.trash.part")
    shutil.rmtree(trash, ignore_errors=True)
    target.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)
