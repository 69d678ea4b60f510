"""A chip whose health check expects a sensor that is not there."""

from __future__ import annotations

from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_health(device):
    raise FileNotFoundError("/sys/class/simchip/temp")
