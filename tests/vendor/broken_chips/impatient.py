"""A chip whose synchronize() returns before the work is done."""

from __future__ import annotations

import importlib
import time

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_activate():
    mst_simchip.mst_activate()
    tensor = importlib.import_module("torch").Tensor
    copy = tensor.cpu

    # The simulated chip works at once, so the wait is put where a value is asked for.
    def late(self):
        time.sleep(0.2)
        return copy(self)

    tensor.cpu = late
