"""A chip whose probe reads a file in the user's home."""

from __future__ import annotations

import os
import pathlib

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_probe():
    pathlib.Path(os.environ["HOME"], ".simchiprc").exists()
    return mst_simchip.mst_probe()
