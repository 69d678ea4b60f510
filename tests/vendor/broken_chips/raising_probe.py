"""A chip whose probe raises when the firmware is old."""

from __future__ import annotations

from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_probe():
    raise RuntimeError("firmware 3 is too old")
