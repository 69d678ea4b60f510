"""A chip whose generator cannot be restored."""

from __future__ import annotations

import importlib

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


def _refuse(state, device=None):
    raise RuntimeError("simchip: the generator's state is read-only")


@hookimpl
def mst_activate():
    mst_simchip.mst_activate()
    importlib.import_module("torch").simchip.set_rng_state = _refuse
