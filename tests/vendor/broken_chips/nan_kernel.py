"""A chip with a kernel that gives NaN."""

from __future__ import annotations

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_environment(devices):
    return {**mst_simchip.mst_environment(devices), "SIMCHIP_FAULT": "nan:aten::silu"}
