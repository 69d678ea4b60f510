"""Find plugins by entry point; one broken vendor must not stop the others."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import pluggy

from mst import hookspecs
from mst.errors import MstError
from mst.request import TASKS

T = TypeVar("T")

GROUP = "mst"
BUILT_IN = "mst-train"
# The engine of `mst.serve` itself, which is no plugin.
BUILTIN_ENGINE = "builtin"
# A healthy import or probe takes well below 2 s; a vendor tool that hangs on a lost device never
# comes back, and `mst devices` has to.
PLUGIN_SECONDS = 5.0
REQUIRED_HOOKS = {
    "backend": ("mst_backend_name", "mst_probe", "mst_capabilities"),
    "export": ("mst_export_name", "mst_export_check", "mst_export", "mst_export_weights"),
    "objective": ("mst_objective_name", "mst_objective"),
    "engine": (
        "mst_engine_name", "mst_engine_facts", "mst_engine_environment", "mst_engine_command",
    ),
}  # fmt: skip
OPTIONAL_HOOKS = {
    "backend": ("mst_health", "mst_telemetry", "mst_environment", "mst_activate"),
    "export": ("mst_export_rounded",),
    "objective": (),
    "engine": ("mst_engine_fault",),
}
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


class PluginError(MstError):
    """A plugin raised, did not answer in time, or answered with something else than agreed."""


@dataclass(frozen=True)
class PluginRecord:
    """What became of one entry point.

    Attributes:
        name: the entry point's name.
        distribution: the installed package that has it, or "" when unknown.
        version: that package's version, or "".
        kinds: of "backend", "export", "objective" and "engine"; empty when it failed before that
            was known.
        status: "ok", "failed" (it is broken) or "refused" (its name is taken).
        reason: why it is not "ok"; "" when it is.
        hooks: the hooks that it implements, sorted.
    """

    name: str
    distribution: str
    version: str
    kinds: tuple[str, ...] = ()
    status: str = "ok"
    reason: str = ""
    hooks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Registry:
    """The plugins that work, and a record of every one that was tried.

    Attributes:
        records: one an entry point, in the order in which they were tried.
        backends: hooks of each backend by its name; calling one asks that plugin only.
        exports: hooks of each export target by its name.
        objectives: hooks of each plugin's objective by its name; mst's own are in
            `mst.training.objectives`.
        engines: hooks of each serving engine by its name; the built-in one is in `mst.serve`.
    """

    records: tuple[PluginRecord, ...]
    backends: Mapping[str, pluggy.HookRelay]
    exports: Mapping[str, pluggy.HookRelay]
    objectives: Mapping[str, pluggy.HookRelay] = field(default_factory=dict)
    engines: Mapping[str, pluggy.HookRelay] = field(default_factory=dict)


@dataclass(frozen=True)
class _Plugin:
    relay: pluggy.HookRelay
    kinds: tuple[str, ...]
    hooks: tuple[str, ...]
    names: Mapping[str, str]


def guarded(call: Callable[[], T], seconds: float | None = PLUGIN_SECONDS) -> T:
    """Return what a plugin's `call` returns, unless it raises or takes too long.

    What the plugin prints goes to standard error, so that `--json` stays JSON. A call that is
    late goes on in a daemon thread, which ends with the process.

    Args:
        call: the plugin's code, without arguments.
        seconds: how long it may take; None runs it in this thread, without a limit.

    Raises:
        PluginError: says which exception it was, or "did not answer in 5 s".
        MstError: the plugin's own, unchanged.
    """
    results: list[T] = []
    raised: list[BaseException] = []

    def answer() -> None:
        try:
            results.append(call())
        except BaseException as error:  # a vendor's code may raise anything, SystemExit included
            raised.append(error)

    with contextlib.redirect_stdout(sys.stderr):
        if seconds is None:
            answer()
        else:
            thread = threading.Thread(target=answer, name="mst-plugin", daemon=True)
            thread.start()
            thread.join(seconds)
    if results:
        return results[0]
    if not raised:
        raise PluginError(f"did not answer in {seconds:g} s")
    error = raised[0]
    if seconds is None and isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, MstError):
        raise error
    raise PluginError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def load(
    entry_points: Iterable[importlib.metadata.EntryPoint] | None = None,
    seconds: float = PLUGIN_SECONDS,
) -> Registry:
    """Import every plugin and return those that work, with a record of each.

    Built-in plugins come first, then the others by the name of their distribution and of their
    entry point. Of two with one name the first keeps it, even when it is broken: whether a
    vendor's code runs must not depend on the health of another's.

    Args:
        entry_points: what to load; the entry points of the installed packages when None.
        seconds: how long the import of one plugin may take.
    """
    if entry_points is None:
        entry_points = importlib.metadata.entry_points(group=GROUP)
    records: list[PluginRecord] = []
    relays: dict[str, dict[str, pluggy.HookRelay]] = {kind: {} for kind in REQUIRED_HOOKS}
    # (what is named, its name) -> the distribution that has it
    # mst's own objectives are no plugins, for every command that trains needs one.
    owners: dict[tuple[str, str], str] = {("objective", name): BUILT_IN for name in TASKS}
    owners["engine", BUILTIN_ENGINE] = BUILT_IN
    found = [(*_distribution(point), point) for point in entry_points]
    found.sort(key=lambda item: (item[0] != BUILT_IN, item[0].lower(), item[2].name, item[2].value))
    for distribution, version, point in found:
        record, plugin = _record(point, distribution, version, owners, seconds)
        records.append(record)
        if plugin is not None:
            for kind, name in plugin.names.items():
                relays[kind][name] = plugin.relay
    return Registry(
        tuple(records),
        relays["backend"],
        relays["export"],
        relays["objective"],
        relays["engine"],
    )


def _record(
    point: importlib.metadata.EntryPoint,
    distribution: str,
    version: str,
    owners: dict[tuple[str, str], str],
    seconds: float,
) -> tuple[PluginRecord, _Plugin | None]:
    """Load one entry point; the plugin is None when it failed or was refused."""

    def record(status: str, reason: str, plugin: _Plugin | None = None) -> PluginRecord:
        kinds, hooks = (plugin.kinds, plugin.hooks) if plugin else ((), ())
        return PluginRecord(point.name, distribution, version, kinds, status, reason, hooks)

    taken = _taken({"entry point": point.name}, owners, distribution)
    if taken:
        return record("refused", taken), None
    owners["entry point", point.name] = distribution
    try:
        plugin = guarded(lambda: _import(point), seconds)
    except MstError as error:
        return record("failed", str(error)), None
    taken = _taken(plugin.names, owners, distribution)
    if taken:
        return record("refused", taken, plugin), None
    owners.update({(kind, name): distribution for kind, name in plugin.names.items()})
    return record("ok", "", plugin), plugin


def _taken(
    names: Mapping[str, str], owners: Mapping[tuple[str, str], str], distribution: str
) -> str:
    """Return which of `names` another plugin has, or ""."""
    for kind, name in names.items():
        owner = owners.get((kind, name))
        if owner is not None:
            return (
                f"{kind} name {name!r} of {distribution or 'an unknown package'} is taken by "
                f"{owner or 'an unknown package'}; uninstall one of the two"
            )
    return ""


def _import(point: importlib.metadata.EntryPoint) -> _Plugin:
    """Import one plugin and check its hooks; raises whatever the plugin raises."""
    module = point.load()
    # One manager a plugin: a hook call, or a wrapper around one, cannot reach another vendor.
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(module, name=point.name)
    manager.check_pending()
    hooks = tuple(sorted(caller.name for caller in manager.get_hookcallers(module) or ()))
    if not hooks:
        raise PluginError(
            f"{point.value} implements no mst hook: mark its functions with mst.hookspecs.hookimpl"
        )
    kinds = tuple(
        kind
        for kind, required in REQUIRED_HOOKS.items()
        if set(hooks) & {*required, *OPTIONAL_HOOKS[kind]}
    )
    for kind in kinds:
        missing = [hook for hook in REQUIRED_HOOKS[kind] if hook not in hooks]
        if missing:
            raise PluginError(
                f"{point.value} implements part of the {kind} hooks; without {', '.join(missing)}"
            )
    names = {
        kind: _checked_name(f"mst_{kind}_name", getattr(manager.hook, f"mst_{kind}_name")())
        for kind in kinds
    }
    return _Plugin(manager.hook, kinds, hooks, names)


def _checked_name(hook: str, name: object) -> str:
    if not isinstance(name, str):
        raise PluginError(f"{hook} returned {type(name).__name__} {name!r}, not str")
    if not _NAME.fullmatch(name) or name == "auto":
        raise PluginError(
            f"{hook} returned {name!r}; a name is lower-case letters, digits, '-' and '_', "
            "begins with a letter and is not 'auto'"
        )
    return name


def _distribution(point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    """Return name and version of the package that has this entry point, "" where unknown."""
    if point.dist is None:
        return "", ""
    return point.dist.name or "", point.dist.version or ""
