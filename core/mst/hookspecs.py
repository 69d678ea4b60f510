"""The vendor's manual: every hook that a device backend or an export target implements.

A plugin is a module (or object) named by an entry point in group `mst`:

    [project.entry-points.mst]
    mychip = "mst_mychip.backend"

Each example below is run by the tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

from mst.facts import Capabilities, DeviceFacts, Probe

if TYPE_CHECKING:
    from mst.export import ExportReport, ExportRequest

hookspec = pluggy.HookspecMarker("mst")
hookimpl = pluggy.HookimplMarker("mst")
