"""A whole backend for a chip that does not exist: what a vendor's package looks like."""

from collections.abc import Mapping, Sequence

from mst.facts import Capabilities, DeviceFacts, Probe
from mst.hookspecs import hookimpl


@hookimpl
def mst_backend_name() -> str:
    return "acme"


@hookimpl
def mst_probe() -> Probe:
    device = DeviceFacts(
        backend="acme",
        index=0,
        name="Acme One [rev 2]",
        arch="a1",
        memory_total_bytes=16 * 2**30,
        memory_free_bytes=15 * 2**30,
        dtypes=("bfloat16", "float32"),
        sources={"memory_total_bytes": "table: Acme One data sheet, page 3"},
    )
    return Probe(found=True, usable=True, devices=(device,))


@hookimpl
def mst_capabilities(device: DeviceFacts) -> Capabilities:
    return Capabilities(torch_device="acmedev", distributed_backend="accl")


@hookimpl
def mst_environment(devices: Sequence[DeviceFacts]) -> Mapping[str, str]:
    return {"ACME_VISIBLE_DEVICES": ",".join(str(device.index) for device in devices)}


@hookimpl
def mst_health(device: DeviceFacts) -> Sequence[str]:
    return ["the fan of Acme One is slow: clean it"]
