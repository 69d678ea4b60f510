"""A chip whose driver is older than its plugin."""

from __future__ import annotations

import dataclasses

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_probe():
    return dataclasses.replace(
        mst_simchip.mst_probe(), usable=False, reason="driver 1.0 is too old: install 2.0"
    )
