"""What may spoil a long job on an Ascend chip: alarms, heat, other processes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mst.facts import DeviceFacts, Telemetry
from mst_backends import npu_smi
from mst_backends.ascend_soc import is_known

# No data sheet gives the limit at which an Ascend slows down. Loaded chips in public reports are
# at 45 to 71 degrees, and npu-smi's own health does not tell of a blocked fan in time.
HOT_CELSIUS = 85
# An idle 910B shows 5 to 9 % of its HBM in use, by its own firmware.
IDLE_MEMORY_SHARE = 0.15


def problems(device: DeviceFacts, reading: npu_smi.Reading) -> list[str]:
    """Return what the user of `device` should know before a long job."""
    found = []
    if not is_known(device.arch) and not reading.error:
        found.append(
            f"{device.arch} is not a chip that mst knows: float16 and float32 only, peaks unknown"
        )
    chips = npu_smi.by_logical_number(reading)
    if device.index == 0:
        found += _lost(reading.info.chips, chips.values())
    chip = chips.get(logical_number(device))
    if chip is None:
        return found
    if chip.health != "OK":
        where = f"-i {chip.npu}" + ("" if chip.chip is None else f" -c {chip.chip}")
        found.append(
            f"npu-smi calls its health {chip.health}: `npu-smi info -t health {where}` says why;"
            " use another chip until it is OK"
        )
    if chip.temperature_celsius is not None and chip.temperature_celsius >= HOT_CELSIUS:
        found.append(f"{chip.temperature_celsius:g} °C: look at its cooling before a long job")
    return found + _held_memory(chip, reading.info.processes)


def telemetry(device: DeviceFacts, reading: npu_smi.Reading) -> Telemetry:
    """Return the power and the heat of `device`; npu-smi counts no energy."""
    if reading.error:
        return Telemetry(reason=reading.error)
    chip = npu_smi.by_logical_number(reading).get(logical_number(device))
    if chip is None:
        return Telemetry(reason=f"npu-smi does not list {device.name} {device.uuid}")
    return Telemetry(
        power_watts=chip.power_watts,
        temperature_celsius=chip.temperature_celsius,
        reason="npu-smi shows no power of this chip" if chip.power_watts is None else "",
    )


def _lost(listed: Sequence[npu_smi.Chip], usable: Collection[npu_smi.Chip]) -> list[str]:
    """Return the chips that npu-smi lists, but to which CANN gives no number."""
    return [
        f"card {one.npu}, chip {one.chip} ({one.name}, health {one.health}) has no logical number"
        " in `npu-smi info -m`: CANN can't use it, and mst leaves it out"
        for one in listed
        if one not in usable
    ]


def _held_memory(chip: npu_smi.Chip, processes: Sequence[npu_smi.Process]) -> list[str]:
    """Return who holds memory of a chip; in a container the processes may be out of sight."""
    own = [one for one in processes if one.npu == chip.npu and one.chip in (None, chip.chip)]
    if own:
        names = ", ".join(
            f"{one.name} (pid {one.pid}) {one.memory_bytes / 2**30:.1f} GiB" for one in own
        )
        return [f"other processes hold memory: {names}; end them, or choose another chip"]
    used, total = chip.memory_used_bytes, chip.memory_total_bytes
    if used is not None and total is not None and used > IDLE_MEMORY_SHARE * total:
        return [
            f"{used / 2**30:.1f} of {total / 2**30:.0f} GiB are in use by processes that npu-smi"
            " does not show here, as of another container; choose another chip"
        ]
    return []


def logical_number(device: DeviceFacts) -> int:
    """Return the number by which CANN knows a device when all are visible."""
    return int(device.uuid.removeprefix("npu-"))
