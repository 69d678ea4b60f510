"""From what the user asked to an engine, and to what it is started with; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mst.cache import cache_dir
from mst.chat import fastest_dtype
from mst.errors import UsageError
from mst.facts import Capabilities, DeviceFacts, MachineFacts, torch_names
from mst.model.files import read_config
from mst.model.sizes import text_part
from mst.plan import Reason
from mst.probe import backend_environment, machine_facts, select_device
from mst.registry import load
from mst.seal.jail.seal import OFF, ROOT, SECCOMP, USER, Seal, current
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.serve.engines import EngineStart, ModelToServe
from mst.serve.engines.choose import AUTO, BUILTIN, EngineChoice, FoundEngine, choose_engine
from mst.serve.engines.environment import environment_dir
from mst.serve.engines.found import find_engines
from mst.serve.engines.job import ExternalJob
from mst.serve.engines.target import model_to_serve
from mst.serve.job import UNNAMED_CONTEXT, EngineJob
from mst.tuned import TunedModel


@dataclass(frozen=True)
class EnginePlan:
    """Which engine, and why; `job` and `external` are None for the built-in one.

    Attributes:
        reason: to be printed.
        machine: that it was chosen for; None where the choice needed none.
        job: the model and the device.
        external: what the engine is started with, its limits those of `job`.
    """

    reason: Reason
    machine: MachineFacts | None = None
    job: EngineJob | None = None
    external: ExternalJob | None = None


def places_of(seal: Seal | None) -> tuple[str, ...]:
    """Return how an engine can be reached in a jail: of "unix" and "port".

    A port is left out where other programs of this machine share the jail's loopback: they would
    ask the engine without a key.
    """
    if seal is None or seal.layer == OFF:
        return ("unix",)
    if seal.layer == SECCOMP:
        return ()
    unix = ("unix",) if seal.unix != "none" else ()
    return (*unix, "port") if seal.layer in (ROOT, USER) else unix


def plan_engine(
    target: str | None,
    device: str,
    environ: Mapping[str, str],
    *,
    asked: str = AUTO,
    engine_dir: str | None = None,
    which: str | None = None,
    adapters: bool = False,
    keys: KeyRing = NO_KEYS,
) -> EnginePlan:
    """Choose the engine, and what one beside the built-in is started with; limits are defaults.

    Args:
        target: as `mst.serve.job.prepare_engine` takes it.
        device: as `mst.probe.select_device` takes it.
        environ: the process's environment.
        asked: as after `--engine`.
        engine_dir: where the environment of that engine lies, if not at the usual place.
        which: a checkpoint of the run.
        adapters: there are further ones.
        keys: the user's, for encrypted runs.

    Raises:
        MstError: no such model, device or engine, or none that serves it.
    """
    if engine_dir is not None and asked in (AUTO, BUILTIN):
        raise UsageError("--engine-dir goes with --engine NAME, whose environment lies there.")
    registry = load()
    if asked == BUILTIN or not registry.engines:
        return EnginePlan(
            Reason("engine", BUILTIN, "asked for" if asked == BUILTIN else "no other")
        )
    name, model = model_to_serve(target, which, environ, keys)
    machine = machine_facts(registry)
    report, chosen, capabilities = select_device(machine, device)
    place = None
    if engine_dir is not None:
        place = (asked, Path(engine_dir).expanduser().absolute())
    engines = find_engines(registry, model, report.name, place)
    places = places_of(current())
    choice = choose_engine(
        model, report.name, engines, asked, adapters=adapters, places=places
    )  # fmt: skip
    if choice.engine == BUILTIN:
        return EnginePlan(choice.reason, machine)
    found = next(each for each in engines if each.name == choice.engine)
    environment = backend_environment(registry, report.name, (chosen,))
    job = _job(name, model, report.name, chosen, capabilities, environment)
    directory = place[1] if place is not None else environment_dir(found.name, report.name)
    external = _external(found, model, job, directory, places)
    return EnginePlan(_reason(choice, found), machine, job, external)


def _job(
    name: str,
    model: ModelToServe,
    backend: str,
    device: DeviceFacts,
    capabilities: Capabilities,
    environment: Mapping[str, str],
) -> EngineJob:
    """Return what a job for the built-in engine says too: the model, the device and the limits."""
    config = text_part(read_config(Path(model.directory)))
    context = config.get("max_position_embeddings")
    (torch_device,) = torch_names((device,), capabilities)
    return EngineJob(
        name=name,
        model=TunedModel(model.directory, None, model.directory, model.template),
        backend=backend,
        torch_device=torch_device,
        dtype=fastest_dtype(device),
        attention=capabilities.attention[0],
        threads=device.compute_units or 1,
        environment=environment,
        context=context if isinstance(context, int) and context > 1 else UNNAMED_CONTEXT,
    )


def _external(
    found: FoundEngine,
    model: ModelToServe,
    job: EngineJob,
    directory: Path,
    places: Sequence[str],
) -> ExternalJob:
    """Return what an engine in an environment of its own is started with."""
    assert found.facts is not None
    assert found.environment is not None
    start = EngineStart(
        model=model,
        served_name=job.name,
        backend=job.backend,
        dtype=job.dtype,
        context=job.context,
        batch=job.batch,
        threads=job.threads,
        environment_dir=str(directory),
        cache_dir=str(cache_dir() / "engines" / found.name),
    )
    return ExternalJob(
        name=found.name,
        version=found.environment.version,
        start=start,
        listens=tuple(each for each in places if each in found.facts.listens),
        features=found.facts.features,
    )


def _reason(choice: EngineChoice, found: FoundEngine) -> Reason:
    """Return why an engine was chosen, with its version and what the user should know of it."""
    assert found.environment is not None
    why = "; ".join(filter(None, (choice.reason.why, found.environment.reason)))
    return Reason("engine", f"{choice.engine} {found.environment.version}", why)
