"""A chip whose probe reports its progress on standard output."""

from __future__ import annotations

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_probe():
    print("searching for chips")
    return mst_simchip.mst_probe()
