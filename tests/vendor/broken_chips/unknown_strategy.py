"""A chip whose plugin names a strategy that the planner does not know."""

from __future__ import annotations

import dataclasses

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_capabilities(device):
    return dataclasses.replace(mst_simchip.mst_capabilities(device), strategies=("single", "magic"))
