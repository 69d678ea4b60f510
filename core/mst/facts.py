"""What a machine has: facts that backends report and everything else only reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DeviceFacts:
    """One physical device.

    Attributes:
        backend: name of the backend that reports it, as in `--device`.
        index: position among that backend's devices, from 0.
        name: the vendor's product name.
        arch: the vendor's architecture name ("x86_64", "sm80", "Ascend910B3").
        memory_total_bytes: what a process on this device could own at most.
        memory_free_bytes: what it could own at the moment of the probe.
        dtypes: torch dtype names that training should use, best first.
        compute_units: cores or multiprocessors that this process may use.
        features: instruction sets or engine features that matter for speed.
        peak_tflops: dense peak by dtype name, where known.
        bandwidth_bytes_per_second: memory bandwidth, where known.
        uuid: what the driver calls this very device, "" when it has no such name.
        driver: version of the driver, "" when unknown.
        links: how each other device of the backend is reached, by its name as in `--device`:
            "NV4", "PIX", "SYS", "HCCS", in the vendor's own words.
        sources: for every number above, where it came from, as "probe: …", "table: …" or
            "measured: …"; keys are the attribute names.
    """

    backend: str
    index: int
    name: str
    arch: str
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    dtypes: tuple[str, ...]
    compute_units: int | None = None
    features: tuple[str, ...] = ()
    peak_tflops: Mapping[str, float] = field(default_factory=dict)
    bandwidth_bytes_per_second: float | None = None
    uuid: str = ""
    driver: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """What one backend found.

    Attributes:
        found: the hardware is there.
        usable: torch can drive it in this environment.
        devices: the devices; may be listed even when not usable.
        reason: what to fix when found but not usable, or why nothing was found.
    """

    found: bool
    usable: bool
    devices: tuple[DeviceFacts, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Capabilities:
    """What a device can run.

    Attributes:
        torch_device: the device type string that torch knows ("cpu", "cuda", "npu").
        distributed_backend: torch.distributed backend name for its collectives.
        strategies: of "single", "ddp", "zero1", "zero2", "zero3".
        quantization: of "none", "nf4", "int8".
        attention: attention implementations of transformers, best first.
        visible_devices_env: variable with which `mst_environment` narrows a worker to its
            devices, which torch then counts from 0; "" when the worker sees all of them, under
            the indices of the facts.
        optimizers: of "adamw_torch", "adamw_8bit", "paged_adamw_8bit".
        compiler: what torch.compile builds kernels for it with ("g++"); "" where there is none.
        liger: Liger's kernels are installed, and Triton compiles them for it.
    """

    torch_device: str
    distributed_backend: str
    strategies: tuple[str, ...] = ("single",)
    quantization: tuple[str, ...] = ("none",)
    attention: tuple[str, ...] = ("eager",)
    visible_devices_env: str = ""
    optimizers: tuple[str, ...] = ("adamw_torch",)
    compiler: str = ""
    liger: bool = False


@dataclass(frozen=True)
class Telemetry:
    """What a device says of itself at one moment, while it works; None is what it does not say.

    Attributes:
        energy_joules: what it has consumed since some fixed moment; only differences mean anything.
        energy_wraps_joules: at which that counter begins again from 0.
        power_watts: what it draws, for devices without such a counter.
        temperature_celsius: of the chip.
        throttled: what slows it down at this moment, in the vendor's words.
        reason: why its energy is not known; "" where it is.
    """

    energy_joules: float | None = None
    energy_wraps_joules: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    throttled: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class BackendReport:
    """One backend's name, what its probe said, and what its devices can run.

    `capabilities` has one entry a device, in the order of `probe.devices`; empty when not usable.
    """

    name: str
    probe: Probe
    capabilities: tuple[Capabilities, ...] = ()
    health: tuple[str, ...] = ()


@dataclass(frozen=True)
class MachineFacts:
    """Everything that is known of this machine before a job is planned."""

    platform: str
    python: str
    backends: tuple[BackendReport, ...]


def torch_names(devices: Sequence[DeviceFacts], capabilities: Capabilities) -> tuple[str, ...]:
    """Return what torch calls each device of a job in its worker.

    Args:
        devices: of one backend.
        capabilities: of the first.
    """
    kind = capabilities.torch_device
    if kind == "cpu":
        return (kind,) * len(devices)
    if capabilities.visible_devices_env:
        return tuple(f"{kind}:{position}" for position in range(len(devices)))
    return tuple(f"{kind}:{each.index}" for each in devices)
