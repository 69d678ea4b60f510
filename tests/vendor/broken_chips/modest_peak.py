"""A chip that is faster than it says, or whose clock stops while it computes."""

from __future__ import annotations

import dataclasses

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_probe():
    probe = mst_simchip.mst_probe()
    devices = tuple(
        dataclasses.replace(
            one,
            peak_tflops={"float32": 1e-5},
            sources={**one.sources, "peak_tflops": "table: the brochure"},
        )
        for one in probe.devices
    )
    return dataclasses.replace(probe, devices=devices)
