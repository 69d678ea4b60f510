"""The plugin with which mst trains on a simulated chip: all that a vendor has to write.

The driver is the package `simchip` beside this file; a vendor's would be their torch extension.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Mapping, Sequence

from simchip.build import library_path
from simchip.settings import Settings, SettingsError, read_settings

from mst.facts import Capabilities, DeviceFacts, Probe
from mst.hookspecs import hookimpl

VISIBLE = "SIMCHIP_VISIBLE_DEVICES"


@hookimpl
def mst_backend_name() -> str:
    """Return "simchip"."""
    return "simchip"


@hookimpl
def mst_probe() -> Probe:
    """Return the chips that the SIMCHIP_ variables plug into this machine."""
    try:
        settings = read_settings(os.environ)
    except SettingsError as error:
        return Probe(found=False, usable=False, reason=str(error))
    if settings.devices == 0:
        return Probe(found=False, usable=False, reason="no chip is plugged in: set SIMCHIP_DEVICES")
    if settings.name != "simchip":
        reason = f"the simulated chip plays another one: SIMCHIP_NAME={settings.name}"
        return Probe(found=False, usable=False, reason=reason)
    devices = tuple(
        _facts(settings, index, ordinal) for index, ordinal in enumerate(settings.visible)
    )
    problem = _problem(settings)
    return Probe(found=True, usable=not problem, devices=devices, reason=problem)


@hookimpl
def mst_capabilities(device: DeviceFacts) -> Capabilities:
    """Return what every simulated chip can run."""
    return Capabilities(
        torch_device="simchip",
        distributed_backend="simccl",
        strategies=("single", "ddp"),
        attention=("sdpa", "eager"),
        visible_devices_env=VISIBLE,
    )


@hookimpl
def mst_environment(devices: Sequence[DeviceFacts]) -> Mapping[str, str]:
    """Return the variable that narrows a worker to `devices`."""
    # By uuid: an index counts the visible devices only, and the variable counts all of them.
    return {VISIBLE: ",".join(device.uuid for device in devices)}


@hookimpl
def mst_activate() -> None:
    """Load the driver, which makes "simchip" a device of torch."""
    importlib.import_module("simchip").load("simchip")


@hookimpl
def mst_health(device: DeviceFacts) -> Sequence[str]:
    """Return that the chip is lost, when the file that says so is there."""
    lost = os.environ.get("SIMCHIP_LOST_FILE", "")
    if lost and os.path.exists(lost):
        return [f"{device.name} {device.uuid} is lost: remove {lost} to plug it in again"]
    return []


def _facts(settings: Settings, index: int, ordinal: int) -> DeviceFacts:
    # Nobody has measured a simulated chip, so its peaks stay unknown.
    return DeviceFacts(
        backend="simchip",
        index=index,
        name="SimChip v1",
        arch="sim1",
        memory_total_bytes=settings.memory_bytes,
        memory_free_bytes=settings.memory_bytes,
        dtypes=("bfloat16", "float16", "float32") if settings.bf16 else ("float16", "float32"),
        uuid=f"sim-{ordinal}",
        driver=importlib.metadata.version("mst-simchip"),
        sources={
            "memory_total_bytes": "probe: SIMCHIP_MEMORY_BYTES, or 4 GiB",
            "memory_free_bytes": "probe: each process has a simulated chip of its own",
        },
    )


def _problem(settings: Settings) -> str:
    """Return why torch can't drive the chips, or ""."""
    if not settings.visible:
        hidden = os.environ.get(VISIBLE, "")
        return f"{VISIBLE}={hidden!r} hides all {settings.devices} of them: unset it"
    try:
        library = library_path()
    except importlib.metadata.PackageNotFoundError:
        return "torch is not installed: python -m pip install torch"
    if not library.exists():
        return "the simchip driver library is not built: run `python -m simchip.build`"
    return ""
