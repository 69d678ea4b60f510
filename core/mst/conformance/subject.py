"""The backend under test: found once, in a process of its own, and read by every check.

Run as `python -m mst.conformance.subject NAME FILE`: writes the `Subject` as JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mst import serial
from mst.durable import write_text
from mst.errors import MstError, UsageError
from mst.facts import BackendReport, Capabilities, DeviceFacts
from mst.probe import backend_environment, machine_facts
from mst.registry import GROUP, PluginError, PluginRecord, Registry, load

# Collectives and copies between devices need two; a third proves nothing more.
DEVICES_USED = 2


@dataclass(frozen=True)
class Subject:
    """A backend as this machine knows it.

    Attributes:
        name: what was asked for.
        plugin: the entry point that has the name and works; None when there is none.
        claims: other entry points that have the name, as backend or as entry point, and failed
            or were refused.
        report: what the backend says; None without a plugin.
        environment: what it wants in a worker on the first two devices.
        environment_fault: why it gave none; "" when it did.
    """

    name: str
    plugin: PluginRecord | None
    claims: tuple[PluginRecord, ...] = ()
    report: BackendReport | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    environment_fault: str = ""


def devices(subject: Subject) -> tuple[DeviceFacts, ...]:
    """Return the usable devices.

    Raises:
        PluginError: there are none; says why.
    """
    if subject.report is None or not subject.report.probe.usable:
        reason = subject.report.probe.reason if subject.report else "its plugin did not load"
        raise PluginError(f"no usable device: {reason or 'the probe gives no reason'}")
    return subject.report.probe.devices


def capabilities(subject: Subject) -> Capabilities:
    """Return what the first device can run.

    Raises:
        PluginError: there is none; says why.
    """
    devices(subject)
    assert subject.report is not None
    return subject.report.capabilities[0]


def is_reference(subject: Subject) -> bool:
    """Return whether this is torch's own CPU, with which all others are compared."""
    return capabilities(subject).torch_device == "cpu"


def own_registry(subject: Subject) -> Registry:
    """Load this backend's plugin and no other, so that no other vendor's fault is blamed on it.

    Raises:
        PluginError: it does not load.
    """
    plugin = subject.plugin
    points = [
        point
        for point in importlib.metadata.entry_points(group=GROUP)
        if plugin is not None
        and point.name == plugin.name
        and (point.dist.name if point.dist else "") == plugin.distribution
    ]
    registry = load(points[:1])
    if subject.name not in registry.backends:
        reasons = [record.reason for record in (*registry.records, *subject.claims)]
        raise PluginError("; ".join(filter(None, reasons)) or "its plugin did not load")
    return registry


def find(name: str, registry: Registry) -> Subject:
    """Return the backend `name` of a registry, asked for its facts.

    Raises:
        UsageError: no entry point and no backend has that name.
    """
    claims = tuple(
        record
        for record in registry.records
        if record.status != "ok"
        and (record.name == name or f"backend name {name!r} of" in record.reason)
    )
    # `load` adds the backends in the order of the records that are "ok".
    loaded = [one for one in registry.records if one.status == "ok" and "backend" in one.kinds]
    plugin = dict(zip(registry.backends, loaded, strict=True)).get(name)
    if plugin is None:
        if not claims:
            raise UsageError(
                f"no backend {name!r} is installed here (installed:"
                f" {', '.join(registry.backends) or 'none'}). `mst plugins` lists every plugin;"
                " install the vendor's package into this environment."
            )
        return Subject(name, None, claims)
    alone = Registry((plugin,), {name: registry.backends[name]}, {})
    subject = Subject(name, plugin, claims, machine_facts(alone).backends[0])
    try:
        used = devices(subject)[:DEVICES_USED]
        return replace(subject, environment=backend_environment(alone, name, used))
    except PluginError as error:
        return replace(subject, environment_fault=str(error))


def main(arguments: list[str]) -> int:
    """Write the subject to the named file; 2 when the name is unknown."""
    name, path = arguments
    try:
        write_text(Path(path), serial.dumps(find(name, load())))
    except MstError as error:
        write_text(Path(path), json.dumps({"error": str(error)}))
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # A plugin's late thread must not hold up the exit.
    sys.exit(code)
