"""Checks of what a backend says of its devices: complete, typed, plausible, with sources."""

from __future__ import annotations

from collections.abc import Iterator

from mst import serial
from mst.configuration import ZERO_STAGES
from mst.conformance.findings import Context, Finding, failed, passed, skipped, verdict
from mst.conformance.hooks import observed
from mst.conformance.processes import device_environment, ending, last_line, start, wait
from mst.conformance.subject import capabilities, devices, own_registry
from mst.facts import Capabilities, DeviceFacts
from mst.probe import backend_environment

DTYPES = frozenset(
    {
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "float8_e4m3fnuz", "float8_e5m2fnuz", "int8",
    }
)  # fmt: skip
STRATEGIES = frozenset(ZERO_STAGES)
QUANTIZATION = frozenset({"none", "nf4", "int8"})
OPTIMIZERS = frozenset({"adamw_torch", "adamw_8bit", "paged_adamw_8bit"})
ATTENTION = frozenset(
    {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "npu_fusion"}
)
ORIGINS = ("probe: ", "table: ", "measured: ")
_COUNT_SECONDS = 120.0


def facts_are_typed(context: Context) -> Finding:
    """Check every answer against the types in mst.facts."""
    observation, _ = observed(context)
    faults = [one.fault for one in observation.stages if one.fault]
    return verdict(
        list(dict.fromkeys(faults)),
        "return the types of mst.facts; mypy checks them against the hookspec",
        "every answer has the types of mst.facts",
    )


def facts_are_plausible(context: Context) -> Finding:
    """Check names, indices, dtypes and figures of each device."""
    found = devices(context.subject)
    faults = [f"{one.backend}:{one.index}: {fault}" for one in found for fault in _implausible(one)]
    return verdict(
        faults,
        "report what the driver says; a figure that is unknown is None",
        f"{len(found)} devices, dtypes {', '.join(found[0].dtypes)}",
        devices=[serial.to_json(one) for one in found],
    )


def _implausible(device: DeviceFacts) -> Iterator[str]:
    if not device.name.strip() or not device.arch.strip():
        yield "name or arch is empty"
    unknown = [dtype for dtype in device.dtypes if dtype not in DTYPES]
    if unknown:
        yield f"dtypes has {', '.join(map(repr, unknown))}, which torch does not know as such"
    if len(set(device.dtypes)) != len(device.dtypes):
        yield "dtypes names one twice"
    total, free = device.memory_total_bytes, device.memory_free_bytes
    if total is not None and not 2**20 <= total <= 2**50:
        yield f"memory_total_bytes is {total}: bytes are meant"
    if free is not None and (free < 0 or (total is not None and free > total)):
        yield f"memory_free_bytes is {free} of memory_total_bytes {total}"
    if device.compute_units is not None and device.compute_units < 1:
        yield f"compute_units is {device.compute_units}"
    for dtype, peak in device.peak_tflops.items():
        if dtype not in DTYPES or not 0 < peak < 1e6:
            yield f"peak_tflops[{dtype!r}] is {peak}: TFLOPS by dtype name are meant"
    bandwidth = device.bandwidth_bytes_per_second
    if bandwidth is not None and not 1e8 <= bandwidth <= 1e15:
        yield f"bandwidth_bytes_per_second is {bandwidth:g}: bytes are meant"


def numbers_have_sources(context: Context) -> Finding:
    """Check that every number says whether it was probed, looked up or measured."""
    faults = [
        f"{one.backend}:{one.index}: {fault}"
        for one in devices(context.subject)
        for fault in _sourceless(one)
    ]
    return verdict(
        faults,
        "add sources={'memory_total_bytes': 'probe: …', …}, one for each number",
        "every number has its source",
    )


def _sourceless(device: DeviceFacts) -> Iterator[str]:
    numbers = {
        "memory_total_bytes": device.memory_total_bytes,
        "memory_free_bytes": device.memory_free_bytes,
        "compute_units": device.compute_units,
        "bandwidth_bytes_per_second": device.bandwidth_bytes_per_second,
        "peak_tflops": device.peak_tflops or None,
    }
    for name, value in numbers.items():
        source = device.sources.get(name, "")
        if value is not None and not source:
            yield f"{name} has no source"
        elif value is not None and not source.startswith(ORIGINS):
            yield f"the source of {name} is {source!r}; it begins with one of {', '.join(ORIGINS)}"


def capabilities_are_known(context: Context) -> Finding:
    """Check that strategies, quantization and attention are names that the planner knows."""
    report = context.subject.report
    devices(context.subject)
    assert report is not None
    faults = list(dict.fromkeys(fault for one in report.capabilities for fault in _unknown(one)))
    first = report.capabilities[0]
    return verdict(
        faults,
        "use the names in mst.facts.Capabilities",
        f"torch device {first.torch_device!r}, {first.distributed_backend},"
        f" strategies {', '.join(first.strategies)}, attention {', '.join(first.attention)}",
        capabilities=serial.to_json(first),
    )


def _unknown(capabilities: Capabilities) -> Iterator[str]:
    for field, known in (
        ("strategies", STRATEGIES), ("quantization", QUANTIZATION), ("attention", ATTENTION),
        ("optimizers", OPTIMIZERS),
    ):  # fmt: skip
        values = getattr(capabilities, field)
        unknown = [value for value in values if value not in known]
        if unknown:
            yield f"{field} has {', '.join(map(repr, unknown))} (known: {', '.join(sorted(known))})"
    if "single" not in capabilities.strategies:
        yield "strategies lacks 'single'"
    if not {"eager", "sdpa"} & set(capabilities.attention):
        yield "attention has neither 'eager' nor 'sdpa', which every model can run"
    if not capabilities.torch_device.isidentifier():
        yield f"torch_device is {capabilities.torch_device!r}; a type without an index is meant"
    if not capabilities.distributed_backend:
        yield "distributed_backend is empty"


def health_answers(context: Context) -> Finding:
    """Check that the health of each device comes back in time, as sentences."""
    report = context.subject.report
    assert report is not None
    faults = [one for one in report.health if one.startswith("mst_health: ")]
    told = f"; it says: {'; '.join(report.health)}" if report.health else ""
    return verdict(
        faults,
        "return one sentence a problem, and [] when the device is well",
        f"{len(report.health)} problems{told}",
        problems=list(report.health),
    )


def environment_is_text(context: Context) -> Finding:
    """Check that the worker's variables are text and narrow it to its devices."""
    subject = context.subject
    if subject.environment_fault:
        return failed(subject.environment_fault, "return a dict of str to str, {} for nothing")
    variable = capabilities(subject).visible_devices_env
    if variable and variable not in subject.environment:
        return failed(
            f"visible_devices_env is {variable!r}, but mst_environment does not set it",
            f"set {variable} in mst_environment, or leave visible_devices_env empty",
        )
    names = ", ".join(subject.environment) or "nothing"
    return passed(f"sets {names}", environment=dict(subject.environment))


def environment_narrows(context: Context) -> Finding:
    """Check that with the environment of one device torch sees exactly that one."""
    subject = context.subject
    variable = capabilities(subject).visible_devices_env
    if not variable:
        return skipped("the backend names no visible_devices_env: workers see every device")
    registry = own_registry(subject)
    found = devices(subject)
    faults = []
    for device in dict.fromkeys((found[0].index, found[-1].index)):
        context.at(f"{subject.name}:{device}")
        variables = backend_environment(registry, subject.name, [found[device]])
        ended = wait(
            start(
                "mst.conformance.activation",
                [str(context.workspace)],
                device_environment(variables),
            ),
            _COUNT_SECONDS,
        )
        if ended.code != 0:
            faults.append(f"{subject.name}:{device}: counting {ending(ended, _COUNT_SECONDS)}")
        elif last_line(ended.output) != "1":
            faults.append(
                f"with {variable}={variables.get(variable)!r} torch sees"
                f" {last_line(ended.output)} devices, not 1"
            )
    return verdict(
        faults,
        f"let mst_environment set {variable} to what the driver obeys",
        f"{variable} narrows a worker to 1 of {len(found)} devices",
    )
