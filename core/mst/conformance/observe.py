"""Watch a backend's hooks in a fresh process, called directly: what they import, print and take.

Run as `python -m mst.conformance.observe WORKSPACE FILE`; standard output is the plugin's own.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mst import serial
from mst.conformance.subject import Subject, own_registry
from mst.durable import write_text
from mst.facts import Capabilities, DeviceFacts, Probe, Telemetry
from mst.probe import type_fault
from mst.registry import PLUGIN_SECONDS

HEAVY = frozenset(
    {"torch", "transformers", "peft", "deepspeed", "bitsandbytes", "tensorflow", "jax", "triton"}
)

# Longer than mst waits, so that a hook that is late and one that hangs can be told apart.
PATIENCE_SECONDS = PLUGIN_SECONDS + 1


@dataclass(frozen=True)
class Stage:
    """One call: which hook, how long it took, how it failed and which heavy modules it loaded."""

    hook: str
    seconds: float
    error: str
    imported: tuple[str, ...]
    fault: str = ""


@dataclass(frozen=True)
class Observation:
    """Every call in order, and how two answers of the probe differ ("" when they do not)."""

    stages: tuple[Stage, ...]
    changed: str


def _heavy() -> set[str]:
    tops = {name.partition(".")[0] for name in sys.modules}
    return {name for name in tops if name in HEAVY or name.startswith("torch_")}


def _watched(hook: str, call: Callable[[], Any], kind: object = None) -> tuple[Stage, Any]:
    """Call in a thread, as `mst` does, and return what could be seen."""
    before, answers, errors = _heavy(), [], []

    def answer() -> None:
        try:
            answers.append(call())
        except BaseException as error:  # a vendor's code may raise anything
            errors.append(f"raised {type(error).__name__}: {' '.join(str(error).split())}")

    began = time.perf_counter()
    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    seconds = time.perf_counter() - began
    if thread.is_alive():
        errors.append(f"did not answer in {PATIENCE_SECONDS:g} s")
    value = answers[0] if answers else None
    fault = "" if errors or kind is None else type_fault(value, kind, f"{hook}'s answer")
    imported = tuple(sorted(_heavy() - before))
    return Stage(hook, seconds, errors[0] if errors else "", imported, fault), value


def observe(subject: Subject) -> Observation:
    """Call every hook of a backend that must not need torch."""
    stage, registry = _watched("import", lambda: own_registry(subject))
    stages = [stage]
    if registry is None:
        return Observation(tuple(stages), "")
    relay = registry.backends[subject.name]
    answers: list[Any] = []
    for _ in range(2):
        stage, probe = _watched("mst_probe", relay.mst_probe, Probe)
        stages.append(stage)
        answers.append(probe)
        if stage.error or stage.fault:
            return Observation(tuple(stages), "")
    devices: Sequence[DeviceFacts] = answers[0].devices
    hooks: list[tuple[str, Any]] = [
        ("mst_health", Sequence[str] | None),
        ("mst_telemetry", Telemetry | None),
    ]
    if answers[0].usable:
        hooks.insert(0, ("mst_capabilities", Capabilities))
    for device in devices:
        for hook, kind in hooks:
            ask = functools.partial(getattr(relay, hook), device=device)
            stages.append(_watched(hook, ask, kind)[0])
    if devices:
        stages.append(
            _watched("mst_environment", lambda: relay.mst_environment(devices=devices))[0]
        )
    return Observation(tuple(stages), _difference(answers[0], answers[1]))


def _difference(first: Probe, second: Probe) -> str:
    """Return what differs between two answers; free memory may."""

    def steady(probe: Probe) -> dict[str, Any]:
        plain = [replace(one, memory_free_bytes=None) for one in probe.devices]
        return serial.to_json(replace(probe, devices=tuple(plain)))

    before, after = steady(first), steady(second)
    if len(before["devices"]) != len(after["devices"]):
        return f"{len(before['devices'])} devices, then {len(after['devices'])}"
    pairs = [("probe", before, after)]
    pairs += [
        (f"devices[{index}]", one, other)
        for index, (one, other) in enumerate(zip(before["devices"], after["devices"], strict=True))
    ]
    for where, one, other in pairs:
        for key in one:
            if key != "devices" and one[key] != other[key]:
                return f"{where}.{key} is {one[key]!r}, then {other[key]!r}"
    return ""


def main(arguments: list[str]) -> int:
    """Write the observation to the named file."""
    workspace, target = map(Path, arguments)
    subject = serial.load(Subject, workspace / "subject.json")
    write_text(target, serial.dumps(observe(subject)))
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # Without interpreter shutdown: a vendor's thread or atexit hook must not hide the answer.
    os._exit(code)
