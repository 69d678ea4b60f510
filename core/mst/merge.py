"""Merging a run's adapter into its base model: what is checked before anything heavy starts."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mst import rundir, serial
from mst.errors import EXIT_INTERRUPTED, Interrupted, MstError, RunError
from mst.launch import KILLED, how_it_ended, run_worker, worker_environment
from mst.model.facts import ModelFacts
from mst.plan import Plan
from mst.quantities import FLOAT_BYTES, gib
from mst.seal.keys.ring import NO_KEYS, KeyRing, handed_down
from mst.tuned import TunedModel, facts_of, of_run

REPORT = "merge.json"
DTYPES = ("bfloat16", "float16", "float32")
_SAFETENSORS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# The tokenizer's files, the card and the manifest: 34 MB for the largest tokenizer known to us
# (Gemma 3's tokenizer.json).
SIDE_FILES_BYTES = 50_000_000


@dataclass(frozen=True)
class MergeJob:
    """What the worker does; all paths are absolute.

    Attributes:
        run: the run directory.
        source: what is merged.
        output_dir: appears when everything in it is written and compared.
        dtype: torch name of the dtype that the weights are stored in.
        attention: transformers' attention implementation.
        threads: CPU threads.
    """

    run: str
    source: TunedModel
    output_dir: str
    dtype: str
    attention: str
    threads: int


@dataclass(frozen=True)
class Agreement:
    """How far two models' logits agree over the same tokens.

    Attributes:
        positions: tokens that were compared.
        max_abs_difference: largest difference of any logit.
        argmax_agreement: share of positions with the same most likely next token.
    """

    positions: int
    max_abs_difference: float
    argmax_agreement: float


@dataclass(frozen=True)
class MergeReport:
    """Where a merged model came from and how it compares with its source; lies in it as JSON.

    Attributes:
        mst_version: that merged it.
        created: UTC, ISO 8601.
        run: name of the run directory.
        model: the base model, as the user named it.
        model_sha256: the base model's fingerprint.
        step: optimizer steps of the merged weights.
        dtype: of the stored weights.
        data_sha256: of the training files.
        merged: base and adapter against the merged model, both float32.
        stored: base and adapter in float32 against the written files, loaded in their dtype.
        base: what the adapter was added into: "none" for the base's own weights, "nf4" or "int8"
            for those that its quantized layers held, dequantized.
    """

    mst_version: str
    created: str
    run: str
    model: str
    model_sha256: str
    step: int | None
    dtype: str
    data_sha256: tuple[str, ...]
    merged: Agreement
    stored: Agreement
    base: str = "none"


def prepare_merge(
    run: Path,
    output_dir: Path | None = None,
    which: str | None = None,
    dtype: str = "auto",
    keys: KeyRing = NO_KEYS,
) -> MergeJob:
    """Check that a merge can work, without torch, and return what to do.

    Args:
        run: the run directory.
        output_dir: default RUN/merged.
        which: a checkpoint, as `mst.tuned.of_run` takes it.
        dtype: "auto" keeps the dtype of the base (for a whole model, of its training).
        keys: the user's, for an encrypted run. What is written is plain all the same.

    Raises:
        MstError: the run, its base model, the output directory or the disk stands in the way.
    """
    target = (run / "merged" if output_dir is None else output_dir).absolute()
    _check_output(target)
    source = of_run(run, which, keys)
    _check_bitsandbytes(source)
    plan = rundir.read_document(Plan, run, rundir.PLAN)
    facts = facts_of(source, keys)
    chosen = stored_dtype(facts, source, plan, dtype)
    needed = facts.parameters * FLOAT_BYTES[chosen] + SIDE_FILES_BYTES
    check_space(target.parent, needed, "the merged model")
    return MergeJob(
        run=str(run.absolute()),
        source=source,
        output_dir=str(target),
        dtype=chosen,
        attention=plan.attention,
        threads=plan.threads,
    )


def merge(job: MergeJob, environ: Mapping[str, str], keys: KeyRing = NO_KEYS) -> MergeReport:
    """Run the worker in the foreground and return what it measured.

    Args:
        job: from `prepare_merge`.
        environ: the process's environment.
        keys: the user's, for an encrypted run; the worker inherits them.

    Raises:
        MstError: it failed, and has said why on standard error; nothing is left behind.
    """
    with claimed(Path(job.output_dir).parent) as lock:
        return merge_claimed(job, environ, lock, keys)


def merge_claimed(
    job: MergeJob, environ: Mapping[str, str], lock: int, keys: KeyRing = NO_KEYS
) -> MergeReport:
    """Do as `merge` does, for a caller that has `claimed` the directory: `lock` is what it got."""
    target = Path(job.output_dir)
    plan = rundir.read_document(Plan, Path(job.run), rundir.PLAN)
    environment = worker_environment(environ, plan.environment)
    with handed_down(keys) as held:
        handles = [] if held is None else [held]
        arguments = [serial.dumps(job), *map(str, handles)]
        code = run_worker("mst.merge_worker", arguments, environment, (lock, *handles))
        if code == 0:
            return serial.load(MergeReport, target / REPORT)
        need = ""
        if code == KILLED:
            held_bytes = facts_of(job.source, keys).parameters * FLOAT_BYTES["float32"]
            need = f"Merging holds the weights in float32: {gib(held_bytes)}"
            part = target.with_name(f".{target.name}.part")
            shutil.rmtree(part, ignore_errors=True)
    if code == EXIT_INTERRUPTED:
        raise Interrupted(f"{job.run} was not merged.")
    raise MstError(f"{job.run} was not merged: {how_it_ended(code, need)}.")


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[int]:
    """Hold a directory's lock, so that two merges or exports don't write the same place.

    Args:
        directory: in which they write; made if it is missing.

    Yields:
        The lock, for a worker to inherit: it must outlive a parent that is killed.

    Raises:
        RunError: another has it, or the directory can't be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RunError(
            f"cannot write in {directory}: {error.strerror}. Pass another --output-dir."
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another merge or export is writing in {directory}. Wait for it, or pass another"
                " --output-dir."
            ) from None
        yield handle
    finally:
        os.close(handle)


def _check_output(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise RunError(f"--output-dir {target} is a file. Pass a new or an empty directory.")
    found = sorted(each.name for each in target.iterdir()) if target.is_dir() else []
    if found:
        raise RunError(
            f"{target} is not empty (it holds {found[0]}) and is never overwritten."
            " Remove it, or pass another --output-dir."
        )


def check_space(directory: Path, needed: int, what: str) -> None:
    """Make sure that the disk holds what will be written below a directory, which may not be there.

    Args:
        directory: or the nearest above it that exists.
        needed: bytes.
        what: is written, for the message.

    Raises:
        RunError: it doesn't, or can't be written.
    """
    place = next(each for each in (directory, *directory.parents) if each.exists())
    if not os.access(place, os.W_OK):
        raise RunError(f"cannot write in {place}. Pass an --output-dir that can be written.")
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RunError(
            f"{what} takes {gib(needed)}; {place} has {gib(free)} free. Free some space, or pass"
            " --output-dir on another disk."
        )


def stored_dtype(facts: ModelFacts, source: TunedModel, plan: Plan, asked: str) -> str:
    """Return the torch name of the dtype that merged weights are stored in.

    Args:
        facts: of `source`.
        source: what is merged.
        plan: of the run.
        asked: as `--dtype` has it.

    Raises:
        RunError: it is "auto", and the base stores its weights in a dtype that mst can't write.
    """
    if asked != "auto":
        return asked
    if source.adapter is None:
        return plan.compute_dtype
    if facts.dtype not in _SAFETENSORS:
        raise RunError(
            f"{source.weights} stores its weights as {facts.dtype}, which --dtype auto does not"
            f" know. Pass --dtype {' or '.join(DTYPES)}."
        )
    return _SAFETENSORS[facts.dtype]


def _check_bitsandbytes(source: TunedModel) -> None:
    if source.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise RunError(
            f"the adapter was trained on weights in {source.quantization}, which bitsandbytes makes"
            " again before they are merged, and it is not installed here. Install it:"
            " python -m pip install 'mst-train[qlora]'"
        )
