"""Load the driver library into torch, and break it on purpose."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Mapping

from simchip.settings import Fault, Settings, parse_faults, read_settings

# A thread of autograd takes the interpreter's lock once more after a backward pass is done. One
# that comes too late, in an interpreter that is ending, aborts the process: with torch 2.13, 12 of
# 16 programs that ended with a backward pass (github.com/pytorch/pytorch/issues/190489).
SETTLE_SECONDS = 0.05
_loaded: list[Settings] = []


def load(name: str = "", environ: Mapping[str, str] | None = None) -> Settings:
    """Make the chips a device type of torch, and return their settings; once in a process.

    Args:
        name: of the device type; SIMCHIP_NAME or "simchip" when "".
        environ: where the SIMCHIP_ variables are read; this process's environment when None.

    Raises:
        SettingsError: a SIMCHIP_ variable can't be understood.
        RuntimeError: the driver library is not built, or another chip is loaded.
    """
    settings = read_settings(os.environ if environ is None else environ)
    name = name or settings.name
    import torch

    # Not above: `python -m simchip.build` would find its own module imported already.
    from simchip.build import library_path

    if _loaded:
        taken = torch._C._get_privateuse1_backend_name()
        if name != taken:
            raise RuntimeError(f"simchip is loaded as {taken!r}; it can't be {name!r} as well")
        return _loaded[0]
    library = library_path()
    if not library.exists():
        raise RuntimeError(
            f"the simchip driver library is not built: {library} is not there."
            " Run `python -m simchip.build`."
        )
    torch.utils.rename_privateuse1_backend(name)
    torch.ops.load_library(str(library))
    torch.ops.simchip.configure(len(settings.visible), settings.memory_bytes)
    _loaded.append(settings)
    clear_faults()
    from simchip import collective, device

    device.describe(settings)
    torch._register_device_module(name, device)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    collective.register(name)
    _break(settings.faults)
    atexit.register(time.sleep, SETTLE_SECONDS)
    return settings


def inject(faults: str) -> None:
    """Break the chip further: `faults` is as in SIMCHIP_FAULT; a "lost:N" counts from here."""
    _break(parse_faults(faults))


def clear_faults() -> None:
    """Repair the chip, a lost one too; one without bfloat16 stays without."""
    import torch

    from simchip import collective

    torch.ops.simchip.clear_faults()
    collective.set_corrupt(False)
    if not _loaded[0].bf16:
        torch.ops.simchip.refuse_dtype(torch.bfloat16)


def calls() -> dict[str, int]:
    """Return how often each operator ran on the chips so far."""
    import torch

    return dict(torch.ops.simchip.calls())


def _break(faults: tuple[Fault, ...]) -> None:
    import torch

    from simchip import collective

    for fault in faults:
        if fault.kind == "collective":
            collective.set_corrupt(True)
        elif fault.kind == "dtype":
            torch.ops.simchip.refuse_dtype(getattr(torch, fault.target))
        else:
            torch.ops.simchip.inject(fault.kind, fault.target, fault.value)
