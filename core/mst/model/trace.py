"""Asking the model's own class for its structure, in a short-lived process, once for a config."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mst import serial
from mst.errors import ModelError
from mst.launch import worker_environment
from mst.model.files import read_config

if TYPE_CHECKING:
    from mst.model.facts import ModelFacts

# Bump when what a trace tells changes, so that old answers are not taken for new ones.
_LAYOUT = 1
# DeepSeek-V3's 61 layers of 256 experts take about 10 s.
_SECONDS = 300


def traced_facts(
    directory: Path, cache_dir: Path, tell: Callable[[str], None] = lambda line: None
) -> ModelFacts:
    """Return the facts of the model that config.json describes; weights need not be there.

    The class of transformers is built on torch's meta device in a process of its own, offline;
    code that comes with a model is never run. The answer is kept in `cache_dir`.

    Raises:
        ModelError: transformers doesn't know the architecture, or refuses the sizes.
    """
    if (already := kept_facts(directory, cache_dir)) is not None:
        return already
    kept = _kept(directory, cache_dir)
    model_type = read_config(directory).get("model_type")
    tell(f"asking transformers for the structure of model_type {model_type!r} (some seconds)")
    facts = _ask(directory)
    with suppress(OSError):  # a cache that can't be written only costs time
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.part")
        part.write_text(serial.dumps(facts), encoding="utf-8")
        part.replace(kept)
    return facts


def kept_facts(directory: Path, cache_dir: Path) -> ModelFacts | None:
    """Return what the class said the last time it was asked; None where nothing is kept."""
    from mst.model.facts import ModelFacts

    with suppress(OSError, ValueError):
        return serial.load(ModelFacts, _kept(directory, cache_dir))
    return None


def _kept(directory: Path, cache_dir: Path) -> Path:
    return cache_dir / "facts" / f"{_key(directory)}.json"


def _key(directory: Path) -> str:
    version = importlib.metadata.version("transformers")
    text = json.dumps([_LAYOUT, version, read_config(directory)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _ask(directory: Path) -> ModelFacts:
    from mst.model.facts import ModelFacts

    try:
        done = subprocess.run(
            [sys.executable, "-m", "mst.model.trace_worker", str(directory)],
            env=worker_environment(os.environ, {"OMP_NUM_THREADS": "1"}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"transformers did not build the model that {directory}/config.json describes in"
            f" {_SECONDS} seconds. Compare its sizes with the source's config.json."
        ) from None
    if done.returncode != 0:
        lines = [each for each in done.stderr.splitlines() if each.strip()]
        raise ModelError(lines[-1] if lines else f"the trace ended with code {done.returncode}.")
    start = done.stdout.index("{")  # a library may have printed a line before
    return serial.from_json(ModelFacts, json.loads(done.stdout[start:]))
