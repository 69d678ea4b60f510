"""What `import torch` calls: loads the stand-in when it is asked for, and never fails."""

from __future__ import annotations

import importlib
import importlib.metadata
import os

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"


def version() -> str:
    """Return torch's release with "+simchip": torch_npu goes with the torch of its own release."""
    return importlib.metadata.version("torch").partition("+")[0] + "+simchip"


def environment() -> dict[str, str]:
    """Return this process's variables, with Ascend's list of visible devices for simchip's."""
    found = dict(os.environ)
    if VISIBLE in found:
        found["SIMCHIP_VISIBLE_DEVICES"] = found[VISIBLE]
    return found


def autoload() -> None:
    """Import torch_npu if SIMCHIP_NAME=npu and a chip is plugged in and built."""
    if os.environ.get("SIMCHIP_NAME") != "npu":
        return
    from simchip.build import library_path
    from simchip.settings import SettingsError, read_settings

    try:
        ready = read_settings(environment()).visible and library_path().exists()
    except SettingsError:
        return
    if ready:
        importlib.import_module("torch_npu")
