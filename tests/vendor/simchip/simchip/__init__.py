"""A simulated accelerator on torch's PrivateUse1: see README.md for what it can do and break.

    import simchip
    simchip.load()
    torch.ones(2, device="simchip")

Nothing here imports torch before `load` is called.
"""

from simchip.driver import calls, clear_faults, inject, load
from simchip.settings import SettingsError, read_settings

__all__ = ["SettingsError", "calls", "clear_faults", "inject", "load", "read_settings"]
