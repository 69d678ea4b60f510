"""What is served, to whom and how: decided before torch is loaded, and handed to the worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mst.chat import run_of
from mst.data.special import read_json
from mst.errors import ModelError, UsageError
from mst.plan import Reason
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.serve.engines.choose import AUTO
from mst.serve.engines.job import ExternalJob
from mst.serve.engines.plan import plan_engine
from mst.serve.http.limits import Limits
from mst.serve.http.listening import Access
from mst.serve.job import EngineJob, prepare_engine
from mst.training.sealed_directory import MANIFEST

_PASSED = "passed"


@dataclass(frozen=True)
class ServeJob:
    """What the worker does.

    Attributes:
        name: by which callers ask for the model; its adapters have their own.
        engine: what is loaded, and where.
        limits: of requests.
        access: who may ask.
        access_log: a line for each request.
        external: the engine that requests are handed on to; None for the built-in one.
        reason: why this engine.
        web: a page for browsers is served too.
    """

    name: str
    engine: EngineJob
    limits: Limits
    access: Access
    access_log: bool = True
    external: ExternalJob | None = None
    reason: Reason | None = None
    web: bool = False


@dataclass(frozen=True)
class What:
    """What the user asked to be served.

    Attributes:
        target: run, artefact, model or GGUF file; None for the newest run, or the default model.
        checkpoint: of the run.
        name: for callers; None for the target's own.
        adapters: texts such as "ward=runs/ward".
        force: serve an artefact that has failed its comparison.
        context: most tokens of a prompt and its answer together; None for what the model says.
        batch: most answers at once; None for the engine's own.
        prefix_bytes: most that is kept of finished answers; None for the engine's own.
        engine: which, "auto" for the one that fits.
        engine_dir: where the environment of the engine lies; None for the usual place.
    """

    target: str | None = None
    checkpoint: str | None = None
    name: str | None = None
    adapters: tuple[str, ...] = ()
    force: bool = False
    context: int | None = None
    batch: int | None = None
    prefix_bytes: int | None = None
    engine: str = AUTO
    engine_dir: str | None = None


def prepare(
    what: What,
    device: str,
    limits: Limits,
    access: Access,
    environ: Mapping[str, str],
    keys: KeyRing = NO_KEYS,
) -> ServeJob:
    """Choose the model and the device, without torch.

    Args:
        what: is served.
        device: as `mst.probe.select_device` takes it.
        limits: of requests.
        access: who may ask.
        environ: the process's environment.
        keys: the user's, for an encrypted run.

    Raises:
        MstError: no such model or device, or an artefact that has failed.
    """
    target = served_target(what.target, what.force)
    adapters = _named(what.adapters)
    planned = plan_engine(
        target,
        device,
        environ,
        asked=what.engine,
        engine_dir=what.engine_dir,
        which=what.checkpoint,
        adapters=bool(adapters),
        keys=keys,
    )
    engine = planned.job or prepare_engine(
        target,
        device,
        environ,
        which=what.checkpoint,
        adapters=adapters,
        keys=keys,
        machine=planned.machine,
    )
    run = run_of(target)
    name = what.name or (engine.name if run is None else run.resolve().name)
    if name in adapters:
        raise UsageError(
            f"the model and an adapter would both be called {name}. Pass --served-name, or give"
            " --adapter another NAME."
        )
    engine = replace(
        engine,
        context=_context(what.context, engine.context),
        batch=what.batch or engine.batch,
        prefix_bytes=engine.prefix_bytes if what.prefix_bytes is None else what.prefix_bytes,
    )
    external = planned.external
    if external is not None:
        if what.prefix_bytes is not None:
            raise UsageError(
                f"--prefix-cache is an option of the built-in engine; {external.name} keeps what it"
                " likes. Leave it out, or pass --engine builtin."
            )
        start = replace(
            external.start, served_name=name, context=engine.context, batch=engine.batch
        )
        external = replace(external, start=start)
    return ServeJob(name, engine, limits, access, external=external, reason=planned.reason)


def _context(asked: int | None, most: int) -> int:
    if asked is None:
        return most
    if not 2 <= asked <= most:
        raise UsageError(f"--context must be from 2 to {most} with this model; found {asked}.")
    return asked


def _named(given: Sequence[str]) -> dict[str, str]:
    """Return the places of adapters by their names.

    Raises:
        UsageError: one has no name, or two have one.
    """
    found: dict[str, str] = {}
    for text in given:
        name, _, place = text.partition("=")
        if not (name and place):
            raise UsageError(f"--adapter takes NAME=PATH, not {text!r}.")
        if name in found:
            raise UsageError(f"two adapters would be called {name}. Give one another NAME.")
        found[name] = place
    return found


def served_target(target: str | None, force: bool) -> str | None:
    """Return what is to be loaded of a target: an artefact's GGUF file, or the target itself.

    Raises:
        ModelError: it is an artefact that has failed its comparison.
    """
    if target is None:
        return None
    directory = Path(target).expanduser()
    manifest = _manifest(directory)
    if manifest is None:
        return target
    if manifest.get("status") != _PASSED and not force:
        faults = manifest.get("faults")
        first = f" ({faults[0]})" if isinstance(faults, list) and faults else ""
        raise ModelError(
            f"the artefact {directory} has not passed its comparison with what was trained{first}."
            " Export it again with other options, or pass --force to serve it as it is."
        )
    files = sorted(directory.glob("*.gguf"))
    if (directory / "config.json").is_file() or len(files) != 1:
        return target
    return str(files[0])


def _manifest(directory: Path) -> Mapping[str, Any] | None:
    """Return the manifest of an export; None where the directory is none."""
    found = read_json(directory / MANIFEST)
    return found if {"format", "status"} <= found.keys() else None
