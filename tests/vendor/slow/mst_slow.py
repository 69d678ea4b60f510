"""A backend whose vendor tool hangs on a lost device."""

import time

from mst.facts import Capabilities, DeviceFacts, Probe
from mst.hookspecs import hookimpl


@hookimpl
def mst_backend_name() -> str:
    return "slow"


@hookimpl
def mst_probe() -> Probe:
    time.sleep(600)
    return Probe(found=False, usable=False)


@hookimpl
def mst_capabilities(device: DeviceFacts) -> Capabilities:
    return Capabilities("slow", "gloo")
