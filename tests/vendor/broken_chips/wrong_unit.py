"""A chip whose plugin reports its memory in GiB."""

from __future__ import annotations

import dataclasses

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_probe():
    probe = mst_simchip.mst_probe()
    devices = tuple(
        dataclasses.replace(one, memory_total_bytes=4, memory_free_bytes=8) for one in probe.devices
    )
    return dataclasses.replace(probe, devices=devices)
