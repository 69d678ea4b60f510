"""Which engine serves a model: a pure function of the model, the device and what is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mst.errors import PlanError, UsageError
from mst.plan import Reason
from mst.registry import BUILTIN_ENGINE
from mst.serve.engines import FEATURES, EngineEnvironment, EngineFacts, ModelToServe, Serves

AUTO, BUILTIN = "auto", BUILTIN_ENGINE
BUILTIN_FACTS = EngineFacts(
    serves=(
        Serves(
            ("merged", "run", "gguf"),
            source="mst.serve.loading: what transformers and PEFT load, in 16 or 32 bits",
        ),
    ),
    listens=(),
    features=FEATURES,
)


@dataclass(frozen=True)
class FoundEngine:
    """An engine as its plugin tells it of this machine and this model.

    Attributes:
        name: as after `--engine`.
        facts: None where the plugin failed.
        environment: None where the plugin failed.
        fault: why it can't serve this model, in the plugin's own words, or how the plugin failed.
    """

    name: str
    facts: EngineFacts | None = None
    environment: EngineEnvironment | None = None
    fault: str = ""


@dataclass(frozen=True)
class EngineChoice:
    """The engine, and why it."""

    engine: str
    reason: Reason


def choose_engine(
    model: ModelToServe,
    backend: str,
    engines: Sequence[FoundEngine],
    asked: str = AUTO,
    *,
    adapters: bool = False,
    places: Sequence[str] = ("unix", "port"),
) -> EngineChoice:
    """Return the engine that serves a model.

    Args:
        model: what is served.
        backend: of the device.
        engines: what plugins tell; the built-in engine needs none.
        asked: as after `--engine`.
        adapters: further adapters are served on the same base.
        places: how an engine can be reached in this jail, of "unix" and "port".

    Raises:
        UsageError: no engine has the name that was asked for.
        PlanError: the engine can't serve it, or none can; says which would, and what it needs.
    """
    builtin = FoundEngine(BUILTIN, BUILTIN_FACTS, EngineEnvironment("", version="mst"))
    every = [builtin, *engines]
    faults = {each.name: why_not(each, model, backend, adapters, places) for each in every}
    able = [each for each in every if not faults[each.name]]
    if asked not in (AUTO, *faults):
        raise UsageError(
            f"--engine {asked}: there is no engine of that name (there is:"
            f" {', '.join((AUTO, *faults))}). `mst plugins` lists what is installed."
        )
    if asked != AUTO:
        if faults[asked]:
            raise PlanError(
                f"--engine {asked} can't serve {model.directory}: {faults[asked]}"
                + _instead(able, faults, asked)
            )
        return EngineChoice(asked, Reason("engine", asked, "asked for"))
    if not able:
        raise PlanError(
            f"no engine here serves {model.directory} ({_words(model)}) on {backend}."
            + "".join(f"\n  {name}: {fault}" for name, fault in faults.items())
            + "\nServe the run itself, or an export of the format merged or gguf, or make the"
            " environment of one that would."
        )
    chosen = min(able, key=lambda each: _rank(each, model, backend))
    return EngineChoice(
        chosen.name, Reason("engine", chosen.name, _why(chosen, model, able, faults))
    )


def why_not(
    engine: FoundEngine,
    model: ModelToServe,
    backend: str,
    adapters: bool,
    places: Sequence[str],
) -> str:
    """Return why an engine can't serve a model here, or ""."""
    if engine.facts is None or engine.environment is None:
        return engine.fault
    facts = engine.facts
    fitting = [each for each in facts.serves if model.format in each.formats]
    if not fitting:
        known = dict.fromkeys(name for each in facts.serves for name in each.formats)
        return f"it loads weights in the format {' or '.join(known)}, and these are {_words(model)}"
    here = [each for each in fitting if not each.backends or backend in each.backends]
    if not here:
        known = dict.fromkeys(name for each in fitting for name in each.backends)
        return f"it computes with {model.format} weights on {' or '.join(known)}, not on {backend}"
    if not any(not each.architectures or model.architecture in each.architectures for each in here):
        known = dict.fromkeys(name for each in here for name in each.architectures)
        return (
            f"it knows {', '.join(known)} with {model.format} weights on {backend}, and this is"
            f" {model.architecture or 'a model that does not say its architecture'}"
        )
    if adapters and engine.name != BUILTIN:
        return "further adapters (--adapter) are served by the built-in engine alone"
    if engine.fault:
        return engine.fault
    if engine.name != BUILTIN and not set(facts.listens) & set(places):
        if not places:
            return (
                "it is reached over a socket, and this jail has none. `mst doctor --seal` says why"
            )
        return (
            f"it listens on a {' or '.join(facts.listens)}, and in this jail only a"
            f" {' or '.join(places)} is safe from other programs of this machine. `mst doctor"
            " --seal` says how to get a namespace"
        )
    if not engine.environment.version:
        return _environment_missing(engine.environment)
    return ""


def _environment_missing(environment: EngineEnvironment) -> str:
    why = environment.reason or "its environment is not here"
    return f"{why}. Make it with one command:\n    {environment.command}"


def _instead(able: Sequence[FoundEngine], faults: dict[str, str], asked: str) -> str:
    if able:
        return f".\nThis would serve it: --engine {' or '.join(each.name for each in able)}"
    others = [f"\n  {name}: {why}" for name, why in faults.items() if name != asked]
    return ".\nNor can another:" + "".join(others)


def _words(model: ModelToServe) -> str:
    artefact = model.exported_as not in ("", model.format)
    return f"{model.format}, exported as {model.exported_as}" if artefact else model.format


def _rank(engine: FoundEngine, model: ModelToServe, backend: str) -> tuple[bool, bool, str]:
    """Return what is compared, the smallest first: made for it, then by the device, then names."""
    assert engine.facts is not None
    made_for = model.exported_as != "" and model.exported_as in engine.facts.made_for
    # Whoever has made the environment of an engine for a chip wants its kernels; on a CPU the
    # built-in one does more, and has been measured beside others.
    own = (engine.name == BUILTIN) == (backend == "cpu")
    return not made_for, not own, engine.name


def _why(
    chosen: FoundEngine, model: ModelToServe, able: Sequence[FoundEngine], faults: dict[str, str]
) -> str:
    assert chosen.facts is not None
    if model.exported_as and model.exported_as in chosen.facts.made_for:
        why = f"{model.exported_as} is written for it"
    else:
        why = f"{model.format} weights"
    others = [each.name for each in able if each.name != chosen.name]
    if others:
        return f"{why}; --engine {' or '.join(others)} would serve it too"
    if chosen.name != BUILTIN:
        return f"{why}; builtin: {faults[BUILTIN]}"
    return why
