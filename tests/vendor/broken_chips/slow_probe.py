"""A chip whose vendor tool takes its time."""

from __future__ import annotations

import time

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_probe():
    time.sleep(2.3)
    return mst_simchip.mst_probe()
