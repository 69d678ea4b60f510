"""Energy and heat of the processors, as the kernel shows their own counters."""

from __future__ import annotations

from pathlib import Path

from mst.facts import Telemetry

# Drivers of the processors' own sensors: Documentation/hwmon/coretemp.rst and k10temp.rst.
SENSORS = ("coretemp", "k10temp", "zenpower")


def telemetry(root: Path = Path("/")) -> Telemetry:
    """Return the energy of all packages together, and the temperature of the hottest.

    Args:
        root: where /sys is; another tree in tests.

    Source: Documentation/power/powercap/powercap.rst; AMD's processors are in the same tree, by
    the same driver (intel_rapl_msr).
    """
    joules, wraps, reason = _energy(root / "sys/class/powercap")
    return Telemetry(
        energy_joules=joules,
        energy_wraps_joules=wraps,
        temperature_celsius=_temperature(root / "sys/class/hwmon"),
        reason=reason,
    )


def _energy(powercap: Path) -> tuple[float | None, float | None, str]:
    """Return joules, where the counters begin again, and why there are none."""
    # A package has one colon; its cores and its memory, which it counts too, have two.
    packages = [each for each in sorted(powercap.glob("intel-rapl:*")) if each.name.count(":") == 1]
    packages = [each for each in packages if _text(each / "name").startswith("package")]
    if not packages:
        return None, None, f"{powercap} has no package: a virtual machine, or no RAPL driver"
    try:
        joules = sum(int((each / "energy_uj").read_text()) for each in packages) / 1e6
    except PermissionError:
        # Since CVE-2020-8694 the counters are kept from users, who could tell secrets by them.
        return None, None, f"only root may read {packages[0]}/energy_uj (CVE-2020-8694)"
    except (OSError, ValueError) as error:
        return None, None, f"{packages[0]}/energy_uj can't be read: {type(error).__name__}"
    ranges = [_text(each / "max_energy_range_uj") for each in packages]
    wraps = int(ranges[0]) / 1e6 if ranges[0].isdigit() else None
    return joules, wraps, ""


def _temperature(hwmon: Path) -> float | None:
    found = [
        int(text) / 1000
        for each in hwmon.glob("hwmon*")
        if _text(each / "name") in SENSORS
        for text in map(_text, each.glob("temp*_input"))
        if text.lstrip("-").isdigit()
    ]
    return max(found, default=None)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
