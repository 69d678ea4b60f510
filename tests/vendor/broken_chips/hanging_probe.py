"""A chip whose vendor tool waits for a lost device."""

from __future__ import annotations

import time

from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_probe():
    time.sleep(600)
