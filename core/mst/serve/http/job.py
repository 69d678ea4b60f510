"""What is served, to whom and how: decided before torch is loaded, and handed to the worker."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mst.chat import choose_model, fastest_dtype, run_of
from mst.errors import ModelError, UsageError
from mst.facts import torch_names
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.serve.http.limits import Limits
from mst.training.checkpoint import MANIFEST
from mst.tuned import TunedModel, facts_of, of_run

# Of the `serve` extra.
PACKAGES = ("uvicorn", "pydantic", "llguidance")
INSTALL = "python -m pip install 'mst-train[serve]'"
_PASSED = "passed"
_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: what a request may call this server, in lower case.
        any_address: a number may stand in place of a name.
        any_name: no name is looked at: it is a unix socket.
        keys_file: of API keys; None asks for none.
        tls_certificate: PEM; None for plain HTTP.
        tls_key: PEM.
        tls_client_ca: PEM; None for any client.
    """

    hosts: tuple[str, ...]
    any_address: bool = False
    any_name: bool = False
    keys_file: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None


@dataclass(frozen=True)
class ServeJob:
    """What the worker does.

    Attributes:
        name: by which callers ask for the model.
        model: what is loaded.
        adapters: name and what is loaded of each, which callers may ask for too.
        backend: whose `mst_activate` is called.
        torch_device: what torch calls the device.
        dtype: of the base weights and the products.
        attention: transformers' attention implementation.
        threads: CPU threads.
        environment: variables set before the worker's interpreter starts.
        context: most tokens of a prompt and its answer together; None where nothing is known.
        dequantized: the base was quantized in training, but this device has no kernels for it.
        limits: of requests.
        access: who may ask.
        access_log: a line for each request.
    """

    name: str
    model: TunedModel
    adapters: tuple[tuple[str, TunedModel], ...]
    backend: str
    torch_device: str
    dtype: str
    attention: str
    threads: int
    environment: Mapping[str, str]
    context: int | None
    dequantized: bool
    limits: Limits
    access: Access
    access_log: bool = True


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
    """

    target: str | None = None
    checkpoint: str | None = None
    name: str | None = None
    adapters: tuple[str, ...] = ()
    force: bool = False
    context: int | None = None


def check_packages() -> None:
    """Refuse to begin where the `serve` extra is missing.

    Raises:
        ModelError: with the command that installs it.
    """
    missing = [each for each in PACKAGES if importlib.util.find_spec(each) is None]
    if missing:
        raise ModelError(f"mst serve needs {', '.join(missing)}, not here. Type: {INSTALL}")


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
    from mst.probe import backend_environment, machine_facts, select_device
    from mst.registry import load

    target = served_target(what.target, what.force)
    described, model = choose_model(target, what.checkpoint, environ, keys=keys)
    run = run_of(target)
    name = what.name or (described if run is None else run.resolve().name)
    facts = facts_of(model, keys)
    registry = load()
    report, chosen, capabilities = select_device(machine_facts(registry), device)
    (torch_device,) = torch_names((chosen,), capabilities)
    return ServeJob(
        name=name,
        model=model,
        adapters=_adapters(what.adapters, name, model, keys),
        backend=report.name,
        torch_device=torch_device,
        dtype=fastest_dtype(chosen),
        attention=capabilities.attention[0],
        threads=chosen.compute_units or 1,
        environment=backend_environment(registry, report.name, (chosen,)),
        context=_context(what.context, facts.max_position_embeddings),
        dequantized=model.quantization not in capabilities.quantization,
        limits=limits,
        access=access,
    )


def _context(asked: int | None, of_model: int | None) -> int | None:
    if asked is None:
        return of_model
    if asked < 2 or (of_model is not None and asked > of_model):
        most = f", and this model reads {of_model} at most" if of_model else ""
        raise UsageError(f"--context must be at least 2{most}; found {asked}.")
    return asked


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
    try:
        found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"format", "status"} <= found.keys() else None


def _adapters(
    given: Sequence[str], served: str, model: TunedModel, keys: KeyRing
) -> tuple[tuple[str, TunedModel], ...]:
    found: dict[str, TunedModel] = {}
    for text in given:
        name, sign, place = text.partition("=")
        if not (name and sign and place):
            raise UsageError(f"--adapter takes NAME=PATH, not {text!r}.")
        if name == served or name in found:
            raise UsageError(f"two models would be called {name}. Give --adapter another NAME.")
        found[name] = _adapter(name, place, model, keys)
    return tuple(found.items())


def _adapter(name: str, place: str, model: TunedModel, keys: KeyRing) -> TunedModel:
    """Return an adapter on the base that is served: of a run, or a directory that PEFT wrote."""
    run = run_of(place)
    if run is not None:
        found = of_run(run, None, keys)
        if found.adapter is None or found.weights != model.weights:
            raise ModelError(
                f"--adapter {name}={place}: that run has no adapter on the model that is served"
                f" ({model.weights}). Serve it by itself, or serve its base model."
            )
        return found
    directory = Path(place).expanduser().absolute()
    if not (directory / _ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"--adapter {name}={place} is neither a run nor a directory with {_ADAPTER_CONFIG}."
        )
    return replace(model, adapter=str(directory), encrypted_run=None, step=None)
