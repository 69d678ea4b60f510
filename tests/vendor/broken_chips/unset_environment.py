"""A chip whose plugin names a variable that it does not set."""

from __future__ import annotations

from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_environment(devices):
    return {}
