"""What a plan is made from: this machine, the model and the data, for a request."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import mst
from mst import rundir
from mst.configuration import ZERO_CHOICES
from mst.demo import demo_defaults
from mst.errors import UsageError
from mst.facts import Capabilities, DeviceFacts, MachineFacts
from mst.model.facts import ModelFacts, read_facts
from mst.model.fingerprint import model_sha256
from mst.model.locate import ModelSource
from mst.model.named import named_model
from mst.registry import Registry
from mst.request import TrainRequest
from mst.rundir import RunManifest
from mst.seal.keys.ring import NO_KEYS, KeyRing, ring_of
from mst.seal.keys.run_key import run_keys
from mst.workload import DataFacts

_VERSIONED = ("torch", "transformers", "peft", "safetensors", "tokenizers")


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
        zero: the stage that a DeepSpeed file asks for; None where `--deepspeed` names no file.
        keys: what opened the data.
    """

    machine: MachineFacts
    where: Where
    source: ModelSource
    model: ModelFacts
    data: DataFacts
    manifest: RunManifest
    zero: str | None
    keys: KeyRing = field(default=NO_KEYS, repr=False)


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
    named = named_model(request, environ, tell)
    directory = named.directory
    weights = not on or bool(list(directory.glob("*.safetensors")))
    model = read_facts(directory, weights=weights, tell=tell)
    tell("reading and tokenizing the data")
    objective = find_objective(request, registry)
    context = model.max_position_embeddings
    prepared = prepare(request, request.dataset, directory, context, objective, keys)
    return Inputs(
        machine=machine,
        where=where,
        source=named.source,
        model=model,
        data=data_facts(prepared, private=request.dp_epsilon is not None),
        manifest=RunManifest(
            status="running",
            mst_version=mst.__version__,
            versions=_versions(),
            model=named.source.name,
            model_path=str(directory.absolute()),
            model_sha256=model_sha256(directory) if weights else "",
            data=prepared.files,
            val_data=prepared.val_files,
            created=rundir.now(),
            model_signature=named.signature,
        ),
        zero=_zero_of_file(request.deepspeed),
        keys=keys,
    )


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


def _zero_of_file(asked: str) -> str | None:
    """Return the stage that a DeepSpeed file asks for; None where `--deepspeed` names no file."""
    from mst.training.deepspeed_config import read_config, stage_of

    return None if asked in ZERO_CHOICES else stage_of(read_config(Path(asked)))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        found[name] = importlib.metadata.version(name)
    return found
