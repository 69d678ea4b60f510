"""A chip whose extension does not load."""

from __future__ import annotations

from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl


@hookimpl
def mst_activate():
    raise OSError("libsimchip.so.2: cannot open shared object file")
