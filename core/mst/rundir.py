"""The run directory: one job's request, plan, facts, metrics, checkpoints and result."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from mst import serial
from mst.data.rows import FileFacts
from mst.durable import write_text
from mst.errors import RunError
from mst.plan import PrivacyBudget
from mst.seal.supply.signature import ModelSignature

MANIFEST = "run.json"
REQUEST = "request.json"
PLAN = "plan.json"
FACTS = "facts.json"
METRICS = "metrics.jsonl"
SEAL = "seal.json"
CHECKPOINTS = "checkpoints"
SET_ASIDE = "set-aside"
LOCK = ".lock"
RENDEZVOUS = ".rendezvous-"
# Longer than `is_locked` holds a lock, on a machine that is busy.
_LOOKING_SECONDS = 0.5


@dataclass(frozen=True)
class ForecastMiss:
    """A time at which memory ran out although the plan said that it would do.

    Attributes:
        step: optimizer step in which it did, from 1; 0 while the model was being loaded.
        micro_batch: rows of the micro-batches.
        checkpointing: activations were recomputed.
        forecast_bytes: what the plan expected of one device.
        measured_bytes: what the process had in use at the most; None when nobody could say.
        available_bytes: what was free when the plan was made.
        cause: "out of memory", or "killed" when the kernel ended the worker for its memory.
        when: UTC, ISO 8601.
        checkpointed_layers: of how many of the first layers; None for all.
    """

    step: int
    micro_batch: int
    checkpointing: bool
    forecast_bytes: int
    measured_bytes: int | None
    available_bytes: int | None
    cause: str
    when: str
    checkpointed_layers: int | None = None


@dataclass(frozen=True)
class RunManifest:
    """What a run is and how it stands; written first as running, last as done or failed.

    Attributes:
        status: "running", "done", "failed" or "interrupted". A run that says running while
            nobody holds its lock was killed.
        mst_version: of the program that started it.
        versions: of Python and the libraries that shape the numbers.
        model: as the user named it.
        model_path: the directory that was loaded.
        model_sha256: of its config and weight headers and sizes.
        data: the files that were read, with their hashes.
        val_data: the same for --val-dataset.
        created: UTC, ISO 8601.
        finished: UTC, ISO 8601; None while it runs.
        error: why it failed; never holds a row.
        results: figures measured at the end.
        outputs: files of the result, to their SHA-256.
        misses: attempts that ran out of memory.
        model_signature: what the model was verified against; None when none was given.
        privacy: what differential privacy the weights of a run that is done have; None for none.
    """

    status: str
    mst_version: str
    versions: Mapping[str, str]
    model: str
    model_path: str
    model_sha256: str
    data: tuple[FileFacts, ...]
    val_data: tuple[FileFacts, ...]
    created: str
    finished: str | None = None
    error: str | None = None
    results: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    misses: tuple[ForecastMiss, ...] = ()
    model_signature: ModelSignature | None = None
    privacy: PrivacyBudget | None = None


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def claim_new(path: Path) -> IO[str]:
    """Make a run directory for a new run and return its lock, held.

    Raises:
        RunError: the directory holds something already, or another run is using it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make --output-dir {path}: {error.strerror}. Choose one that can be written."
        ) from None
    # Looked at before the lock is made, so that a directory of the user's own stays untouched,
    # and after, because another run may have been quicker.
    if not (path / LOCK).exists():
        _refuse_taken(path)
    lock = take_lock(path)
    try:
        _refuse_taken(path)
    except RunError:
        lock.close()
        raise
    return lock


def _refuse_taken(path: Path) -> None:
    found = sorted(each.name for each in path.iterdir() if each.name != LOCK)
    if (path / MANIFEST).is_file():
        status = read_manifest(path).status
        raise RunError(
            f"--output-dir {path} holds another run (status: {status}). Pass another --output-dir,"
            f" or go on with that run: mst train --output-dir {path} --resume"
        )
    if found:
        raise RunError(
            f"--output-dir {path} is not empty (it holds {found[0]}) and is no run of mst."
            " Pass a new or an empty directory."
        )


def take_lock(path: Path) -> IO[str]:
    """Return the directory's lock, held until the file is closed or every holder has died.

    Raises:
        RunError: another process holds it, or the directory can't be written.
    """
    try:
        # Kept inheritable: the worker holds it too, so that it stays taken if we are killed.
        lock = (path / LOCK).open("a+")
    except OSError as error:
        raise RunError(
            f"cannot write in {path}: {error.strerror}. Choose an --output-dir that can be written."
        ) from None
    if not _locks(lock):
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise RunError(
            f"{path} is in use by another mst (process {holder})."
            " Wait for it, or pass another --output-dir."
        )
    with contextlib.suppress(OSError):  # a full disk must not keep a run from being resumed
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    return lock


def _locks(lock: IO[str]) -> bool:
    """Take a lock, and return whether it could be had; who only looks at it holds it a moment."""
    end = time.monotonic() + _LOOKING_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        else:
            return True


def is_locked(path: Path) -> bool:
    """Return whether some process holds the run directory's lock.

    To look, it is shared for a moment, which `take_lock` waits for.
    """
    try:
        with (path / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def read_manifest(path: Path) -> RunManifest:
    """Return a run's manifest.

    Raises:
        RunError: no run is there, or its manifest is damaged.
    """
    return _read(RunManifest, path, MANIFEST)


def read_document(kind: type[serial.T], path: Path, name: str) -> serial.T:
    """Return one of a run's JSON documents.

    Raises:
        RunError: it is missing or damaged.
    """
    return _read(kind, path, name)


def _read(kind: type[serial.T], path: Path, name: str) -> serial.T:
    file = path / name
    if not file.is_file():
        raise RunError(
            f"{path} is no run directory: it has no {name}. `mst runs list` shows the runs here."
        )
    try:
        return serial.load(kind, file)
    except (ValueError, UnicodeDecodeError, RecursionError):
        raise RunError(
            f"{file} is damaged. Restore it from a backup, or start a new run."
        ) from None


def write_document(path: Path, name: str, value: object) -> None:
    """Write one JSON document of a run, at once.

    Raises:
        RunError: it can't be written.
    """
    try:
        write_text(path / name, serial.dumps(value))
    except OSError as error:
        raise RunError(f"cannot write {path / name}: {error.strerror}. Free some space.") from None


def update_manifest(path: Path, **changes: Any) -> RunManifest:
    """Change fields of the manifest and write it at once."""
    manifest = replace(read_manifest(path), **changes)
    write_document(path, MANIFEST, manifest)
    return manifest


def add_miss(path: Path, miss: ForecastMiss) -> None:
    """Record in the manifest that memory ran out."""
    update_manifest(path, misses=(*read_manifest(path).misses, miss))


def state_of(path: Path) -> str:
    """Return the status, or "killed" when it says running and nobody is."""
    status = read_manifest(path).status
    return "killed" if status == "running" and not is_locked(path) else status


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the metrics' lines; a last line cut off by a crash is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in (path / METRICS).read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


@contextlib.contextmanager
def metrics_writer(path: Path, after_step: int) -> Iterator[IO[str]]:
    """Open the metrics for appending, dropping what a resumed run will write again.

    Args:
        path: the run directory.
        after_step: lines of later steps are dropped.
    """
    kept = [each for each in read_metrics(path) if each.get("step", 0) <= after_step]
    try:
        text = "".join(json.dumps(each) + "\n" for each in kept)
        write_text(path / METRICS, text)
        with (path / METRICS).open("a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise RunError(
            f"cannot write {path / METRICS}: {error.strerror}. Free some space, then run the same"
            " command with --resume."
        ) from None
