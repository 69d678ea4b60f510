"""A chip whose probe asks torch."""

from __future__ import annotations

import importlib

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_probe():
    importlib.import_module("torch")
    return mst_simchip.mst_probe()
