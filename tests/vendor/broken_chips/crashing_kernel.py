"""A chip with a kernel that reads where it must not."""

from __future__ import annotations

import importlib
import os
import signal

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl

_library = []


def _silu(x):
    os.kill(os.getpid(), signal.SIGSEGV)


@hookimpl
def mst_activate():
    mst_simchip.mst_activate()
    library = importlib.import_module("torch").library.Library("aten", "IMPL")
    library.impl("silu", _silu, "AutogradPrivateUse1")
    _library.append(library)
