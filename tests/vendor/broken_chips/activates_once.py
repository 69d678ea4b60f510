"""A chip that registers itself anew at each activation."""

from __future__ import annotations

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl

_done = []


@hookimpl
def mst_activate():
    if _done:
        raise RuntimeError("the device simchip is registered already")
    mst_simchip.mst_activate()
    _done.append(True)
