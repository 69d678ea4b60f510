"""A backend whose hook takes an argument that the specification does not have."""

from mst.facts import Capabilities, Probe
from mst.hookspecs import hookimpl


@hookimpl
def mst_backend_name() -> str:
    return "mistyped"


@hookimpl
def mst_probe(timeout: float) -> Probe:
    return Probe(found=False, usable=False)


@hookimpl
def mst_capabilities() -> Capabilities:
    return Capabilities("mistyped", "gloo")
