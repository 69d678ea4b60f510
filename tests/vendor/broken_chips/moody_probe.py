"""A chip that counts its devices anew, and differently, at each call."""

from __future__ import annotations

import dataclasses

import mst_simchip
from mst_simchip import *  # noqa: F403 -- every other hook is the healthy chip's

from mst.hookspecs import hookimpl

_answers = []


@hookimpl
def mst_probe():
    probe = mst_simchip.mst_probe()
    _answers.append(probe)
    kept = probe.devices[: len(_answers)]
    return dataclasses.replace(probe, devices=kept)
