"""A training job from the request to its result: probe, plan, claim a directory, run the worker."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import mst
from mst import rundir
from mst.configuration import ZERO_CHOICES, ZERO_STAGES
from mst.demo import demo_defaults
from mst.errors import (
    EXIT_FAILED,
    EXIT_OUT_OF_MEMORY,
    EXIT_PEER_FAILED,
    MstError,
    RunError,
    UsageError,
)
from mst.explicit import as_explicit
from mst.facts import Capabilities, DeviceFacts, MachineFacts
from mst.longest import LongestRows, longest_rows
from mst.model.facts import ModelFacts, read_facts, weight_files
from mst.model.locate import ModelSource, locate
from mst.plan import Plan
from mst.planner import plan as make_plan
from mst.registry import Registry
from mst.request import TrainRequest
from mst.rundir import RunManifest
from mst.seal.audit import open_log, record
from mst.seal.audit.facts import job_facts, outcome_facts, run_facts
from mst.seal.container.layout import read_front
from mst.seal.jail.holder import known
from mst.seal.keys.ring import NO_KEYS, KeyRing, handed_down, ring_of
from mst.seal.keys.run_key import make_run_key, run_keys
from mst.seal.supply.before_use import verify_before_use
from mst.seats import Seats
from mst.space import open_space
from mst.workload import DataFacts

_VERSIONED = ("torch", "transformers", "peft", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Job:
    """A planned job: everything that is written into its run directory.

    `seats` is where the other machines' commands are met, when they share the job. `keys` opened
    the data and open an encrypted run; they are written nowhere.
    """

    request: TrainRequest
    machine: MachineFacts
    source: ModelSource
    model: ModelFacts
    data: DataFacts
    plan: Plan
    manifest: RunManifest
    seats: Seats | None = None
    keys: KeyRing = field(default=NO_KEYS, repr=False)


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


def cache_dir() -> Path:
    """Return where converted models are kept: never data. XDG_CACHE_HOME moves it."""
    import platformdirs

    return platformdirs.user_cache_path("mst")


def with_defaults(request: TrainRequest, given: frozenset[str]) -> TrainRequest:
    """Return the request with the demo's recipe where no data set was named.

    Args:
        request: what the user asked.
        given: options that the user spelt out; these are kept.

    Raises:
        UsageError: two of them exclude each other.
    """
    if {"val_size", "val_dataset"} <= given:
        raise UsageError(
            "--val-size and --val-dataset were both given. Hold out a share of --dataset, or files"
            " of their own: pass one."
        )
    if request.dataset:
        return request
    recipe = {key: value for key, value in demo_defaults().items() if key not in given}
    if "val_size" in given:
        del recipe["val_dataset"]
    return replace(request, **recipe)


@dataclass(frozen=True)
class Where:
    """The devices that a plan is for, as `mst.planner.plan` takes them."""

    backend: str
    devices: tuple[DeviceFacts, ...]
    capabilities: tuple[Capabilities, ...]
    environment: Mapping[str, str]
    host_bytes: int | None


@dataclass(frozen=True)
class Inputs:
    """What a plan is made from.

    Attributes:
        machine: this one.
        where: the devices to plan for.
        source: where the model was found.
        model: its shape.
        data: the encoded rows.
        manifest: which model and which files these are.
        keys: what opened the data.
    """

    machine: MachineFacts
    where: Where
    source: ModelSource
    model: ModelFacts
    data: DataFacts
    manifest: RunManifest
    keys: KeyRing = field(default=NO_KEYS, repr=False)


def gather(
    request: TrainRequest,
    environ: Mapping[str, str],
    tell: Callable[[str], None] = lambda line: None,
    on: str | None = None,
) -> Inputs:
    """Probe the machine, find the model and read the data; nothing is written but the cache of a
    converted model.

    Args:
        request: with `with_defaults` applied.
        environ: the process's environment.
        tell: shown to the user before each part that takes long.
        on: hardware to plan for instead of this machine, as `mst.hardware` reads it.

    Raises:
        MstError: whatever stands in the way.
    """
    # Imported late: `mst --help` needs none of it.
    from mst.data.prepare import data_facts, prepare
    from mst.probe import machine_facts
    from mst.registry import load
    from mst.training.objectives import find_objective

    keys = ring_of(request.key_file, request.passphrase_file, request.pkcs11)
    if request.encrypt_run:
        _check_encryption(request, keys)
    registry = load()
    machine = machine_facts(registry)
    where = _named_machine(on, registry, tell) if on else _this_machine(machine, request, registry)
    source = locate(request.model, request.models_dir, environ)
    signature = verify_before_use(
        source.path, request.model_signature, request.model_public_key, tell
    )
    directory = _converted(source, tell)
    weights = not on or bool(list(directory.glob("*.safetensors")))
    model = read_facts(directory, weights=weights, tell=tell)
    tell("reading and tokenizing the data")
    objective = find_objective(request, registry)
    context = model.max_position_embeddings
    prepared = prepare(request, request.dataset, directory, context, objective, keys)
    return Inputs(
        machine=machine,
        where=where,
        source=source,
        model=model,
        data=data_facts(prepared, private=request.dp_epsilon is not None),
        manifest=RunManifest(
            status="running",
            mst_version=mst.__version__,
            versions=_versions(),
            model=source.name,
            model_path=str(directory.absolute()),
            model_sha256=model_sha256(directory) if weights else "",
            data=prepared.files,
            val_data=prepared.val_files,
            created=rundir.now(),
            model_signature=signature,
        ),
        keys=keys,
    )


def prepare_job(
    request: TrainRequest,
    environ: Mapping[str, str],
    tell: Callable[[str], None] = lambda line: None,
    on: str | None = None,
) -> Job:
    """Gather what a plan is made from, and plan; arguments are those of `gather`.

    Raises:
        MstError: whatever stands in the way.
    """
    from mst.privacy.budget import with_budget

    found = gather(request, environ, tell, on)
    where, data = found.where, found.data
    made = make_plan(
        where.backend,
        where.devices,
        where.capabilities,
        where.environment,
        found.model,
        data,
        request,
        where.host_bytes,
        _zero_of_file(request.deepspeed),
    )
    if request.dp_epsilon is not None:
        tell("finding the noise for --dp-epsilon")
        made = with_budget(made, request, data.units)
    if ZERO_STAGES[made.strategy]:
        # A file that contradicts the plan is told of now, before anything is claimed or loaded.
        from mst.training.deepspeed_config import config_of

        config_of(made, request)
    return Job(
        request=_anywhere(request, found.source),
        machine=found.machine,
        source=found.source,
        model=found.model,
        data=data,
        plan=made,
        manifest=replace(found.manifest, privacy=made.privacy),
        keys=found.keys,
    )


def longest_of(found: Inputs, request: TrainRequest) -> LongestRows:
    """Return how long rows may be, in each way to train that the request leaves open.

    Raises:
        PlanError: an explicit choice can't be met, or nothing fits.
    """
    where = found.where
    zero = _zero_of_file(request.deepspeed)
    space = open_space(
        where.devices,
        where.capabilities,
        found.model,
        found.data,
        request,
        where.host_bytes,
        zero,
    )
    return longest_rows(space)


def _check_encryption(request: TrainRequest, keys: KeyRing) -> None:
    """Make sure that an encrypted run can be written, or read again where it is resumed.

    Raises:
        UsageError: no key was named, or a part of the run would lie in the clear.
        EncryptionError: the run to be resumed does not open.
    """
    if request.offload_dir is not None:
        raise UsageError(
            f"--encrypt-run was given with --offload-dir {request.offload_dir}, where DeepSpeed"
            " writes optimizer states as they are. Leave --offload-dir out: what is offloaded stays"
            " in memory then."
        )
    if request.resume is not None:
        run_keys(Path(str(request.output_dir)), keys)
    elif not (keys.key_files or keys.passphrases or keys.tokens):
        raise UsageError(
            "--encrypt-run was given without a key. Pass --key-file FILE (made by `mst data keygen"
            " --key-file FILE`), --passphrase-file FILE or --pkcs11 URI; of several, each opens it."
        )


def model_directory(
    request: TrainRequest, environ: Mapping[str, str], tell: Callable[[str], None]
) -> Path:
    """Return the directory of the model that a request names; a GGUF file is converted.

    Raises:
        ModelError: it isn't found, can't be converted, or isn't what was signed.
    """
    source = locate(request.model, request.models_dir, environ)
    verify_before_use(source.path, request.model_signature, request.model_public_key, tell)
    return _converted(source, tell)


def _converted(source: ModelSource, tell: Callable[[str], None]) -> Path:
    if not source.is_gguf:
        return source.path
    from mst.model.gguf import convert

    return convert(source.path, cache_dir(), tell)


def _anywhere(request: TrainRequest, source: ModelSource) -> TrainRequest:
    """Return the request with paths that mean the same from every working directory."""
    from mst.data.sources import absolute_spec
    from mst.training.rewards import absolute_specs

    info = request.dataset_info
    return replace(
        request,
        model=str(source.path.absolute()),
        model_signature=_absolute(request.model_signature),
        model_public_key=_absolute(request.model_public_key),
        dataset=tuple(absolute_spec(each, info) for each in request.dataset),
        val_dataset=tuple(absolute_spec(each, info) for each in request.val_dataset),
        reward_funcs=absolute_specs(request.reward_funcs),
        dataset_info=_absolute(info),
        # Keys are named anew by each command: a run directory tells nobody where they lie.
        key_file=None,
        passphrase_file=None,
        pkcs11=None,
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def _zero_of_file(asked: str) -> str | None:
    """Return the stage that a DeepSpeed file asks for; None where `--deepspeed` names no file."""
    from mst.training.deepspeed_config import read_config, stage_of

    return None if asked in ZERO_CHOICES else stage_of(read_config(Path(asked)))


def _this_machine(machine: MachineFacts, request: TrainRequest, registry: Registry) -> Where:
    from mst.probe import backend_environment, select_devices

    report, devices, capabilities = select_devices(machine, request.device, request.nproc_per_node)
    environment = backend_environment(registry, report.name, devices)
    hosts = [one.probe.devices for one in machine.backends if one.name == "cpu"]
    free = next((one[0].memory_free_bytes for one in hosts if one), None)
    return Where(report.name, devices, capabilities, environment, free)


def _named_machine(on: str, registry: Registry, tell: Callable[[str], None]) -> Where:
    from mst.hardware import read_hardware

    found = read_hardware(on, registry)
    tell(found.note)
    return Where(found.backend, found.devices, found.capabilities, {}, found.host_bytes)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        found[name] = importlib.metadata.version(name)
    return found


def default_output_dir(source: ModelSource) -> Path:
    """Return a new directory's name under ./runs: the local time and the model."""
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{source.name.split('/')[-1]}"
    return next(
        path
        for path in (
            Path("runs") / f"{name}{suffix}" for suffix in ("", *map("-{}".format, range(2, 100)))
        )
        if not path.exists()
    )


def begin(job: Job) -> tuple[Path, IO[str]]:
    """Claim the run directory and write the job into it; return it with its lock, held.

    Raises:
        RunError: the directory holds another run, is in use, or can't be written.
        EncryptionError: the key of an encrypted run can't be written.
    """
    path = Path(job.request.output_dir or default_output_dir(job.source)).absolute()
    lock = rundir.claim_new(path)
    if job.request.encrypt_run:
        make_run_key(path, job.keys)
    write_documents(path, job)
    return path, lock


def write_documents(path: Path, job: Job) -> None:
    """Write a job into its run directory, whose lock is held."""
    # The manifest comes last: a directory without it is no run.
    rundir.write_document(path, rundir.FACTS, job.machine)
    explicit = as_explicit(job.request, job.plan)
    rundir.write_document(path, rundir.REQUEST, replace(explicit, output_dir=str(path)))
    rundir.write_document(path, rundir.PLAN, job.plan)
    seal = known()
    if seal is not None:
        rundir.write_document(path, rundir.SEAL, seal)
    rundir.write_document(path, rundir.MANIFEST, job.manifest)


def execute(path: Path, job: Job, lock: IO[str], environ: Mapping[str, str]) -> int:
    """Run the worker in the foreground; return its exit code.

    A worker that dies without a word (killed, out of memory) is recorded as failed.
    """
    record("train.begun", **job_facts(job), **run_facts(path))
    try:
        return _execute(path, job, lock, environ)
    finally:
        record("train.ended", **outcome_facts(path))


def _execute(path: Path, job: Job, lock: IO[str], environ: Mapping[str, str]) -> int:
    from mst.shared_job import hand_over_run
    from mst.workers import run_workers, write_deepspeed

    try:
        if job.plan.nnodes > 1 and job.seats is None:
            raise RunError(
                f"the run in {path} is for {job.plan.nnodes} machines. Type `mst train --nnodes"
                f" {job.plan.nnodes} --master-addr …` on each, with its --node-rank (and --resume"
                " on machine 0), or pass --nnodes 1."
            )
        if ZERO_STAGES[job.plan.strategy]:
            write_deepspeed(path, job.plan, job.request)
        if job.seats:
            hand_over_run(path, job.manifest, job.seats)
    except MstError as error:
        rundir.update_manifest(path, status="failed", finished=rundir.now(), error=str(error))
        raise
    with handed_down(job.keys) as handle:
        code = run_workers(path, job.plan, environ, job.seats, (lock.fileno(),), handle)
    if code != 0 and rundir.read_manifest(path).status == "running":
        cause = f"the worker ended with code {code}"
        if code == EXIT_PEER_FAILED:
            cause = "another process of this job was lost"
        if code == 128 + 9:
            cause = "the worker was killed (SIGKILL); the kernel does that when memory runs out"
        rundir.update_manifest(path, status="failed", finished=rundir.now(), error=cause)
        if code == EXIT_OUT_OF_MEMORY:  # told on the machine where it was
            return code
        raise RunError(
            f"{cause}. What was saved is whole; go on with: mst train --output-dir {path} --resume"
        )
    return code


def train(
    *,
    environ: Mapping[str, str] | None = None,
    audit_log: str | Path | None = None,
    **options: Any,
) -> tuple[Path, RunManifest]:
    """Train as `mst train` does, from Python; return the run directory and its manifest.

    The workers run in the jail; the program that calls this does not, nor do plugins in it.

    Args:
        environ: the environment; default the process's own.
        audit_log: directory of the audit log; default as the settings say.
        options: the fields of `mst.request.TrainRequest`, in Python's types; single paths may
            stand for lists of one.

    Raises:
        MstError: whatever stands in the way, or the run failed.
    """
    from mst.cli.options import convert
    from mst.request import fields
    from mst.seal.audit.arguments import given_fields

    unknown = [each for each in options if each not in fields()]
    if unknown:
        raise MstError(f"mst.train takes no option {unknown[0]!r}; see mst.request.TrainRequest.")
    values = {name: convert(name, each, name) for name, each in options.items() if each is not None}
    given = frozenset(values)
    environment = os.environ if environ is None else environ
    directory = None if audit_log is None else Path(audit_log).expanduser().absolute()
    with open_log(directory, "train", api="mst.train", options=given_fields(values)) as command:
        code, path = _train(TrainRequest(**values), given, environment)
        if command is not None:
            command.code = code
    manifest = rundir.read_manifest(path)
    if code:
        error = MstError(manifest.error or f"the run in {path} failed")
        error.exit_code = code or EXIT_FAILED
        raise error
    return path, manifest


def _train(
    request: TrainRequest, given: frozenset[str], environ: Mapping[str, str]
) -> tuple[int, Path]:
    from mst.attempts import run_to_end
    from mst.resume import resume
    from mst.seal.jail.command import of_request, outputs_of
    from mst.seal.jail.holder import asking
    from mst.seal.jail.seal import Scene, check

    request = with_defaults(request, given)
    scene = Scene(outputs=outputs_of(request))
    check(of_request(request), scene)
    with asking(of_request(request), scene):
        if request.resume is not None:
            path, lock, job = resume(request, given, environ)
        else:
            job = prepare_job(request, environ)
            path, lock = begin(job)
        with lock:
            return run_to_end(path, job, lock, environ), path
