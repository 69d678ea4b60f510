"""A model's fingerprint, which tells it from others."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mst.model.facts import weight_files
from mst.seal.container.layout import read_front


def model_sha256(directory: Path, encrypted: bool = False) -> str:
    """Return a fingerprint of a model: its config, and its weight files' headers and sizes.

    Reading all weights would take minutes for a large model; the headers tell models apart. Those
    of encrypted files hold random numbers, which do too, and are read without a key.
    """
    hasher = hashlib.sha256((directory / "config.json").read_bytes())
    for path in weight_files(directory, encrypted):
        with path.open("rb") as file:
            if encrypted:
                hasher.update(read_front(str(path), file).fixed)
            else:
                hasher.update(file.read(int.from_bytes(file.read(8), "little")))
        hasher.update(str(path.stat().st_size).encode())
    return hasher.hexdigest()
