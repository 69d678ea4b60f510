"""What the page shows beside runs: the devices with their health, and the audit log's state."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from mst import serial
from mst.errors import MstError
from mst.facts import DeviceFacts
from mst.last_lines import last_lines

# What the backends have said is good for so long; asking them starts vendors' tools.
_FRESH_SECONDS = 10.0
_LAST_BYTES = 1 << 16


class Machine:
    """Devices as their backends report them. Its methods may be called from any thread."""

    def __init__(self) -> None:
        """Nobody is asked yet."""
        self._lock = threading.Lock()
        self._found: dict[str, Any] = {}
        self._asked = 0.0

    def state(self) -> dict[str, Any]:
        """Return the devices, their health and telemetry, and the host's memory."""
        with self._lock:
            if not self._found or time.monotonic() - self._asked > _FRESH_SECONDS:
                self._found = _devices()
                self._asked = time.monotonic()
            return {**self._found, "host": _host()}


def _devices() -> dict[str, Any]:
    from mst.bench.meters import asking
    from mst.probe import machine_facts
    from mst.registry import load

    registry = load()
    facts = machine_facts(registry)

    def device(facts: DeviceFacts) -> dict[str, Any]:
        told = asking(registry, facts)()
        return {
            "name": f"{facts.backend}:{facts.index}",
            "product": facts.name,
            "driver": facts.driver,
            "memory_total_bytes": facts.memory_total_bytes,
            "memory_free_bytes": facts.memory_free_bytes,
            "compute_units": facts.compute_units,
            "dtypes": list(facts.dtypes),
            "temperature_celsius": told.temperature_celsius,
            "power_watts": told.power_watts,
            "throttled": list(told.throttled),
        }

    return {
        "platform": facts.platform,
        "backends": [
            {
                "name": each.name,
                "found": each.probe.found,
                "usable": each.probe.usable,
                "reason": each.probe.reason,
                "health": list(each.health),
                "devices": [device(one) for one in each.probe.devices],
            }
            for each in facts.backends
        ],
        "plugins": [
            {"name": each.name, "status": each.status, "reason": each.reason}
            for each in registry.records
            if each.status != "ok"
        ],
    }


def _host() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    return {"memory_total_bytes": memory.total, "memory_free_bytes": memory.available}


def audit_state(directory: Path) -> dict[str, Any]:
    """Return what lies in the audit log's directory, without checking it."""
    from mst.seal.audit import place

    found: dict[str, Any] = {"directory": str(directory), "problem": None}
    try:
        names = place.segments(directory)
        found["files"] = len(names)
        found["bytes"] = sum((directory / each).stat().st_size for each in names)
        found["last_time"] = _last_time(directory / names[-1]) if names else None
    except (MstError, OSError) as error:
        found |= {"files": 0, "bytes": 0, "last_time": None, "problem": str(error)}
    return found


def _last_time(segment: Path) -> str | None:
    import json

    for line in reversed(last_lines(segment, _LAST_BYTES).split(b"\n")):
        try:
            return str(json.loads(line)["time"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def audit_verified(directory: Path) -> dict[str, Any]:
    """Return what `mst audit verify` finds, which reads all of the log."""
    from mst.seal.audit.upkeep import verify_or_nothing

    try:
        found = verify_or_nothing(directory)
    except (MstError, OSError) as error:
        return {"whole": False, "events": 0, "problems": [str(error)]}
    if found is None:
        return {"whole": None, "events": 0, "problems": []}
    plain = serial.to_json(found)
    kept = ("events", "unsigned", "unended", "problems", "acknowledged")
    return {"whole": found.is_whole, **{name: plain[name] for name in kept}}
