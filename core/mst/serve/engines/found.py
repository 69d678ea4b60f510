"""What engines' plugins tell, checked: a plugin that fails takes no other with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mst.errors import MstError, PlanError
from mst.probe import type_fault
from mst.registry import PluginError, Registry, guarded
from mst.serve.engines import (
    EngineCommand,
    EngineEnvironment,
    EngineFacts,
    EngineStart,
    ModelToServe,
)
from mst.serve.engines.choose import FoundEngine
from mst.serve.engines.environment import environment_dir


def find_engines(
    registry: Registry, model: ModelToServe, backend: str, place: tuple[str, Path] | None = None
) -> tuple[FoundEngine, ...]:
    """Return what every engine's plugin says of this machine and this model.

    Args:
        registry: the plugins.
        model: what is to be served.
        backend: of the device.
        place: an engine, and the directory of its environment where that isn't the usual one.
    """
    found = []
    for name in sorted(registry.engines):
        directory = environment_dir(name, backend)
        if place is not None and place[0] == name:
            directory = place[1]
        found.append(_found(registry, name, model, backend, directory))
    return tuple(found)


def _found(
    registry: Registry, name: str, model: ModelToServe, backend: str, directory: Path
) -> FoundEngine:
    hooks = registry.engines[name]
    try:
        facts = _asked(hooks.mst_engine_facts, EngineFacts, "mst_engine_facts")
        environment = _asked(
            lambda: hooks.mst_engine_environment(directory=str(directory), backend=backend),
            EngineEnvironment,
            "mst_engine_environment",
        )
        fault = _asked(
            lambda: hooks.mst_engine_fault(model=model, backend=backend) or "",
            str,
            "mst_engine_fault",
        )
    except MstError as error:
        return FoundEngine(name, fault=f"its plugin failed: {error}")
    return FoundEngine(name, facts, environment, fault)


def command_of(registry: Registry, name: str, start: EngineStart) -> EngineCommand:
    """Return how an engine is started.

    Raises:
        PlanError: the plugin raises, or answers with something else than agreed.
    """
    if name not in registry.engines:
        raise PlanError(f"no engine {name!r} is installed here. Run `mst plugins` to see why.")
    hook = registry.engines[name].mst_engine_command
    try:
        found: EngineCommand = _asked(
            lambda: hook(start=start), EngineCommand, "mst_engine_command"
        )
    except PluginError as error:
        raise PlanError(f"the plugin of the engine {name} gave no command: {error}.") from error
    return found


def _asked(call: Callable[[], Any], kind: type, name: str) -> Any:
    answer = guarded(call)
    fault = type_fault(answer, kind, f"{name}'s answer")
    if fault:
        raise PluginError(fault)
    return answer
