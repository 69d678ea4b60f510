"""A chip whose copies lose bits."""

from __future__ import annotations

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_environment(devices):
    fault = "skew:aten::_copy_from=0.001"
    return {**mst_simchip.mst_environment(devices), "SIMCHIP_FAULT": fault}
