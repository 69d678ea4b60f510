"""A GGUF file as an ordinary model directory, converted once and cached."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mst import cache
from mst.durable import seal_directory, sha256
from mst.errors import ModelError
from mst.launch import offline_environment
from mst.seal.jail.holder import sealed

# Bump when what a conversion writes changes, so that old copies are not taken for new ones.
_LAYOUT = 1
_DONE = "converted.ok"


def cached_copy(path: Path, cache_dir: Path) -> Path:
    """Return where the converted copy of a GGUF file belongs; it may not exist yet."""
    return cache_dir / "models" / f"{path.stem}-{sha256(path)[:16]}-v{_LAYOUT}"


def kept_copy(path: Path) -> Path | None:
    """Return the newest converted copy of a file of this name and not older; None where none is.

    It is told by the file's name, for its hash takes a while; so it is to be looked at, not to be
    trained.
    """
    models = cache.cache_dir() / "models"
    try:
        since = path.stat().st_mtime
        found = [
            (mark.stat().st_mtime, mark.parent)
            for mark in models.glob(f"{glob.escape(path.stem)}-*-v{_LAYOUT}/{_DONE}")
        ]
    except OSError:
        return None
    return max((each for each in found if each[0] >= since), default=(0.0, None))[1]


def convert(path: Path, cache_dir: Path, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Return a model directory (safetensors, tokenizer.json, chat template) made from a GGUF file.

    The copy is dequantized to bfloat16. It is made in a process of its own, in a temporary
    directory that is renamed when whole, under a lock: two runs at once convert once.

    Raises:
        ModelError: not a GGUF file, an architecture that transformers can't read, no space.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file (it does not start with 'GGUF').")
    target = cached_copy(path, cache_dir)
    if (target / _DONE).is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = (target.parent / f".{target.name}.lock").open("w")
    except OSError as error:
        raise ModelError(
            f"cannot write the converted copy of {path.name} to {target.parent}: {error.strerror}."
            " Set XDG_CACHE_HOME to a directory that can be written."
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / _DONE).is_file():
            tell(f"converting {path.name} for training, once (about 20 seconds)")
            _convert_locked(path, target)
    return target


def _convert_locked(path: Path, target: Path) -> None:
    work = target.with_name(f".{target.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    done = subprocess.run(
        sealed([sys.executable, "-m", "mst.model.gguf_worker", str(path), str(work)]),
        env=os.environ | offline_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        shutil.rmtree(work, ignore_errors=True)
        lines = [each for each in done.stderr.splitlines() if each.strip()]
        cause = lines[-1].strip()[:300] if lines else f"exit code {done.returncode}"
        raise ModelError(
            f"cannot convert {path} for training: {cause}."
            " Check the free space and that `pip install gguf` is done; or pass the original"
            " model's directory with its safetensors."
        )
    (work / _DONE).touch()
    seal_directory(work, target)
