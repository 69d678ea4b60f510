"""Hooks of a device backend."""

# A hook specification is its signature and its docstring; it is never called.
# mypy: disable-error-code="empty-body"
# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mst.facts import Capabilities, DeviceFacts, Probe, Telemetry
from mst.hookspecs.markers import hookspec


@hookspec(firstresult=True)
def mst_backend_name() -> str:
    """Return the backend's short unique name, as users write it after `--device`.

    Called:
        Once, when plugins are loaded, in every process of `mst`.

    Returns:
        Lower-case letters, digits, "-" and "_", beginning with a letter; "auto" is taken. A
        backend always has a name, so there is no way to report nothing.

    If it raises:
        The plugin is listed as failed by `mst plugins`; the others are loaded.

    Example:
        ```python
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_backend_name() -> str:
            return "mychip"
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_probe() -> Probe:
    """Return what is here, told from files and vendor tools, without importing torch.

    Called:
        By `mst devices`, `mst doctor`, `mst plan` and `mst train`, in their own process, before
        anything is planned; never in a training worker. It has 5 seconds and should take
        less than 2. It runs in a thread, so it must not install signal handlers.

    Returns:
        A `Probe` with one `DeviceFacts` a device, indexed from 0 in order. With nothing to
        report: `Probe(found=False, usable=False, reason="why")`. Hardware without its driver
        or torch extension: `found=True, usable=False` and what to install as the reason. Every
        number has its origin in `sources`.

    If it raises:
        Or if it is late, or returns another type: the backend counts as not found, and
        `mst doctor` prints what happened. Better to catch and say what to fix.

    Example:
        ```python
        from pathlib import Path

        from mst.facts import DeviceFacts, Probe
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_probe() -> Probe:
            nodes = sorted(Path("/dev").glob("mychip[0-9]*"))
            if not nodes:
                return Probe(found=False, usable=False, reason="no /dev/mychip*: load the driver")
            devices = tuple(
                DeviceFacts("mychip", index, "MyChip 1", "mc1", None, None, ("bfloat16",))
                for index in range(len(nodes))
            )
            return Probe(found=True, usable=True, devices=devices)
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_capabilities(device: DeviceFacts) -> Capabilities:
    """Return what one device can run; the planner chooses from it.

    Called:
        Right after `mst_probe`, in the same process, once for each device of a usable probe;
        it has 5 seconds and must not import torch.

    Args:
        device: one of the devices that this backend's probe returned.

    Returns:
        A `Capabilities`. With nothing to report beyond the device's torch name and its
        collectives, leave the other fields at their defaults, which promise the least.

    If it raises:
        Or returns another type: the backend counts as found but not usable, for this reason.

    Example:
        ```python
        from mst.facts import Capabilities, DeviceFacts
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_capabilities(device: DeviceFacts) -> Capabilities:
            fused = device.arch == "mc1"
            return Capabilities(
                torch_device="mychip",
                distributed_backend="myccl",
                strategies=("single", "ddp"),
                attention=("sdpa", "eager") if fused else ("eager",),
                visible_devices_env="MYCHIP_VISIBLE_DEVICES",
            )
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_health(device: DeviceFacts) -> Sequence[str]:
    """Return problems of one device that its user should know of before a long job.

    Called:
        After `mst_probe`, in the same process, once for each device that was found, usable or
        not; it has 5 seconds and must not import torch.

    Args:
        device: one of the devices that this backend's probe returned.

    Returns:
        One sentence a problem: what is wrong and what to do. Empty when the device is well.

    If it raises:
        The failure itself is shown as a problem of the device; the device stays usable.

    Example:
        ```python
        from collections.abc import Sequence

        from mst.facts import DeviceFacts
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_health(device: DeviceFacts) -> Sequence[str]:
            free, total = device.memory_free_bytes, device.memory_total_bytes
            if free is not None and total is not None and free < total // 2:
                return [f"another process holds half of {device.name}: see `mychip-smi`"]
            return []
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_telemetry(device: DeviceFacts) -> Telemetry:
    """Return the energy that one device has consumed, its heat, and what slows it down.

    Called:
        By `mst bench`, in its own process, about once a second while another process works on the
        device; it has 5 seconds, should take less than 0.1, and must not import torch.

    Args:
        device: one of the devices that this backend's probe returned.

    Returns:
        A `Telemetry`: a counter of joules where the device has one, else the watts that it draws,
        which are added up over time. With nothing to report: `Telemetry(reason="why")`.

    If it raises:
        Or is late: energy and heat of the measurement are unknown, for this reason.

    Example:
        ```python
        from pathlib import Path

        from mst.facts import DeviceFacts, Telemetry
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_telemetry(device: DeviceFacts) -> Telemetry:
            file = Path(f"/sys/class/mychip/mychip{device.index}/energy_uj")
            if not file.exists():
                return Telemetry(reason=f"{file} is not there: it needs driver 2.1")
            return Telemetry(energy_joules=int(file.read_text()) / 1e6)
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_environment(devices: Sequence[DeviceFacts]) -> Mapping[str, str]:
    """Return variables that a worker needs before its interpreter starts.

    Called:
        Once a job, in the process that plans it; the result is written into the plan, and the
        launcher sets it for every worker. It has 5 seconds and must not import torch.

    Args:
        devices: the devices of this backend that the job will use, at least one.

    Returns:
        Variable names to values, both text; they replace what the user's shell has set. An
        empty mapping when there is nothing to set. Where the capabilities name a
        `visible_devices_env`, it is among them and shows the worker exactly `devices`, which
        torch then counts from 0 in this order; an index in `devices` counts what the user's
        own setting of that variable left visible.

    If it raises:
        The job is not started, and the error names the backend and what happened.

    Example:
        ```python
        from collections.abc import Mapping, Sequence

        from mst.facts import DeviceFacts
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_environment(devices: Sequence[DeviceFacts]) -> Mapping[str, str]:
            visible = ",".join(str(device.index) for device in devices)
            return {"MYCHIP_VISIBLE_DEVICES": visible, "MYCHIP_LOG_LEVEL": "error"}
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_activate() -> None:
    """Make the torch device of this backend usable in this process.

    The one hook that may import torch, and the one place that loads the vendor's extension and
    registers its collectives with torch.distributed. Extensions of torch that it does not load
    are hidden from the worker.

    Called:
        Once in each worker, in its main thread, after the worker's environment is set and
        before any tensor is made. It has no time limit.

    Returns:
        Nothing. Leave the hook out when torch already drives the device by itself.

    If it raises:
        The worker stops before it loads the model, and the error names the backend.

    Example:
        ```python
        import importlib

        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_activate() -> None:
            # Importing the extension registers the device "mychip" with torch.
            importlib.import_module("torch_mychip")
        ```

    Added in 0.1.0.
    """
