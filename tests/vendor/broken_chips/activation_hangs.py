"""A chip whose extension waits for a device that never answers."""

from __future__ import annotations

import time

from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_activate():
    time.sleep(600)
