"""Ask every backend what is here, and choose the device a job runs on."""

from __future__ import annotations

import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass

import pluggy

from mst.errors import MstError, NoDeviceError
from mst.extensions import hide_extensions
from mst.facts import BackendReport, Capabilities, DeviceFacts, MachineFacts, Probe
from mst.registry import PLUGIN_SECONDS, PluginError, Registry, guarded

# A backend that is not usable reports no capabilities, so not what torch calls its devices;
# `--device npu` must still lead to its reason.
TORCH_NAMES = {"npu": "ascend"}
# How the reason begins when the probe itself failed: the backend is at fault, not the machine.
FAILED_PROBE = "mst_probe: "


def machine_facts(registry: Registry, seconds: float = PLUGIN_SECONDS) -> MachineFacts:
    """Return what every backend says of this machine; a backend that fails says why.

    Args:
        registry: the plugins, from `mst.registry.load`.
        seconds: how long one answer of one backend may take.
    """
    system = os.uname()
    return MachineFacts(
        platform=f"{system.sysname} {system.release} {system.machine}",
        python=".".join(str(part) for part in sys.version_info[:3]),
        backends=tuple(_report(registry, name, seconds) for name in registry.backends),
    )


def host_facts(registry: Registry) -> DeviceFacts | None:
    """Return the host as the CPU's backend counts it, control groups included, asking no other.

    None where that backend can't tell.
    """
    if "cpu" not in registry.backends:
        return None
    return next(iter(_report(registry, "cpu", PLUGIN_SECONDS).probe.devices), None)


def select_device(
    facts: MachineFacts, device: str
) -> tuple[BackendReport, DeviceFacts, Capabilities]:
    """Return the device that `device` asks for, with its backend and what it can run.

    Args:
        facts: this machine.
        device: "auto" for the first usable device that is not a CPU, else the CPU; or a
            backend's name or torch's name of its devices, alone or with ":" and an index.

    Raises:
        NoDeviceError: when it is not here or not usable; says what is and why.
    """
    if device == "auto":
        usable = [report for report in facts.backends if report.probe.usable]
        if not usable:
            raise _no_device(facts, device, "")
        chosen = next((report for report in usable if report.name != "cpu"), usable[0])
        return chosen, chosen.probe.devices[0], chosen.capabilities[0]
    name, _, index = device.partition(":")
    report = _named(facts, name)
    if report is None:
        raise _no_device(facts, device, f"no backend is called {name!r}")
    if not report.probe.usable:
        raise _no_device(facts, device, f"{report.name}: {report.probe.reason}")
    for one, capabilities in zip(report.probe.devices, report.capabilities, strict=True):
        if (not index and device == name) or str(one.index) == index:
            return report, one, capabilities
    raise _no_device(facts, device, f"{report.name} has {len(report.probe.devices)} of them")


def select_devices(
    facts: MachineFacts, device: str, count: int | None
) -> tuple[BackendReport, tuple[DeviceFacts, ...], tuple[Capabilities, ...]]:
    """Return the devices that a job may use, with their backend and what each can run.

    Args:
        facts: this machine.
        device: as `select_device` takes it.
        count: from the one it returns on; the CPU counts as often as it is asked for. None for
            all of the backend, but for one alone where `device` names it by its index.

    Raises:
        NoDeviceError: there are fewer.
    """
    report, first, capabilities = select_device(facts, device)
    if capabilities.torch_device == "cpu":
        return report, (first,) * (count or 1), (capabilities,) * (count or 1)
    if count is None:
        count = 1 if ":" in device else len(report.probe.devices)
    start = report.probe.devices.index(first)
    found = report.probe.devices[start : start + count]
    if len(found) < count:
        raise _no_device(
            facts,
            device,
            f"--nproc-per-node {count} asks for as many from {report.name}:{first.index} on, and"
            f" there {'is' if len(found) == 1 else 'are'} {len(found)}",
        )
    return report, found, report.capabilities[start : start + count]


def backend_environment(
    registry: Registry, backend: str, devices: Sequence[DeviceFacts]
) -> dict[str, str]:
    """Return the variables that a worker on `devices` needs before it starts.

    Raises:
        PluginError: when the backend is not installed, raises, or returns something else.
    """
    hook = _relay(registry, backend).mst_environment
    try:
        variables = guarded(lambda: hook(devices=devices))
        # None: the hook is left out.
        _check(variables, Mapping[str, str] | None, "mst_environment's answer")
    except PluginError as error:
        raise PluginError(
            f"the {backend} backend gave no environment for a worker: {error}. "
            "Run `mst doctor` to see what else it reports."
        ) from error
    return dict(variables or {})


def activate(registry: Registry, backend: str) -> None:
    """Let the backend make its torch device usable in this process, and hide all other vendors'.

    Raises:
        PluginError: when the backend is not installed or its `mst_activate` raises.
    """
    try:
        guarded(_relay(registry, backend).mst_activate, seconds=None)
    except PluginError as error:
        raise PluginError(
            f"the {backend} backend could not be activated: {error}. Run `mst doctor` to see why."
        ) from error
    hide_extensions()


def type_fault(value: object, kind: object, where: str) -> str:
    """Return how `value` differs from the annotation `kind`, or "" when it does not.

    Knows what the fact types are made of: dataclasses, `X | None`, `tuple[X, ...]`, sequences,
    mappings and plain classes. An int will do for a float; a bool will not do for an int.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        faults = [type_fault(value, one, where) for one in arguments]
        return "" if "" in faults else faults[0]
    if origin is not None and isinstance(origin, type):
        if not isinstance(value, origin) or isinstance(value, str):
            return f"{where} is {type(value).__name__} {value!r}, not {origin.__name__}"
        if isinstance(value, Mapping):
            parts = [(key, arguments[0], f"key of {where}") for key in value]
            parts += [(one, arguments[1], f"{where}[{key!r}]") for key, one in value.items()]
        else:
            parts = [
                (one, arguments[0], f"{where}[{index}]")
                for index, one in enumerate(typing.cast("Sequence[object]", value))
            ]
        return next((fault for part in parts if (fault := type_fault(*part))), "")
    assert isinstance(kind, type)
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        return f"{where} is {type(value).__name__} {value!r}, not {kind.__name__}"
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for field in fields(kind):
            fault = type_fault(
                getattr(value, field.name), hints[field.name], f"{where}.{field.name}"
            )
            if fault:
                return fault
    return ""


def _report(registry: Registry, name: str, seconds: float) -> BackendReport:
    """Ask one backend; whatever it does becomes a report."""
    relay = registry.backends[name]
    try:
        probe = guarded(relay.mst_probe, seconds)
        _check_probe(name, probe)
    except MstError as error:
        return BackendReport(name, Probe(False, False, reason=f"{FAILED_PROBE}{error}"))
    health = tuple(
        problem for device in probe.devices for problem in _health(relay, device, seconds)
    )
    capabilities: tuple[Capabilities, ...] = ()
    if probe.usable:
        try:
            capabilities = tuple(_capabilities(relay, one, seconds) for one in probe.devices)
        except MstError as error:
            reason = f"mst_capabilities: {error}"
            probe = Probe(probe.found, False, probe.devices, reason)
    return BackendReport(name, probe, capabilities, health)


def _check_probe(name: str, probe: object) -> None:
    """Raise PluginError unless a backend's answer to `mst_probe` is what was agreed."""
    _check(probe, Probe, "its answer")
    assert isinstance(probe, Probe)
    if probe.usable and not (probe.found and probe.devices):
        raise PluginError("its answer is usable, but has no device")
    for position, device in enumerate(probe.devices):
        if (device.backend, device.index) != (name, position):
            raise PluginError(
                f"its answer's devices[{position}] is called {device.backend}:{device.index}, "
                f"not {name}:{position}"
            )
        if not device.dtypes:
            raise PluginError(f"its answer's devices[{position}] has no dtype")


def _capabilities(relay: pluggy.HookRelay, device: DeviceFacts, seconds: float) -> Capabilities:
    answer = guarded(lambda: relay.mst_capabilities(device=device), seconds)
    _check(answer, Capabilities, "its answer")
    return typing.cast("Capabilities", answer)


def _health(relay: pluggy.HookRelay, device: DeviceFacts, seconds: float) -> tuple[str, ...]:
    """Return a device's problems; a check that fails is one of them."""
    try:
        answer = guarded(lambda: relay.mst_health(device=device), seconds)
        _check(answer, Sequence[str] | None, "its answer")
    except MstError as error:
        return (f"mst_health: {error}",)
    return tuple(answer or ())


def _check(value: object, kind: object, where: str) -> None:
    fault = type_fault(value, kind, where)
    if fault:
        raise PluginError(fault)


def _relay(registry: Registry, backend: str) -> pluggy.HookRelay:
    if backend not in registry.backends:
        raise PluginError(
            f"no backend {backend!r} is installed here (installed: "
            f"{', '.join(registry.backends) or 'none'}). Run `mst plugins` to see what failed."
        )
    return registry.backends[backend]


def _named(facts: MachineFacts, name: str) -> BackendReport | None:
    """Return the backend of this name, else the first usable one whose torch device it is."""
    for report in facts.backends:
        if report.name == name:
            return report
    for report in facts.backends:
        if any(one.torch_device == name for one in report.capabilities):
            return report
    alias = TORCH_NAMES.get(name)
    return next((report for report in facts.backends if report.name == alias), None)


def _no_device(facts: MachineFacts, device: str, why: str) -> NoDeviceError:
    here = [
        f"{one.backend}:{one.index}"
        for report in facts.backends
        if report.probe.usable
        for one in report.probe.devices
    ]
    message = f"no {device!r} device to use here (found: {', '.join(here) or 'none'})"
    message += f"; {why.rstrip('.')}." if why else "."
    instead = "Pass --device auto, or run" if here else "Run"
    return NoDeviceError(f"{message} {instead} `mst doctor` to see what each backend reports.")
