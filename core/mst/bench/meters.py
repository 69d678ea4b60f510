"""What goes on around a measurement: the device's energy and heat, and who else is at work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mst.errors import MstError
from mst.facts import DeviceFacts, Telemetry
from mst.probe import type_fault
from mst.registry import PluginError, Registry, guarded

# Telemetry is asked for about so often; npu-smi takes a second itself, so never more than a tenth
# of the time is spent on asking.
EVERY_SECONDS = 1.0
_SHARE = 10.0
_BUSY_SECONDS = 0.5
_ASK_SECONDS = 5.0
# By what share the time that was metered may differ from that of the steps.
_OFF = 0.1

Asked = Callable[[], Telemetry]


@dataclass
class EnergyMeter:
    """Adds up what a device says of its energy between two moments.

    Attributes:
        joules: since it was begun; None as long as nothing is known.
        hottest: degrees Celsius.
        throttled: what slowed the device, each once.
        reason: why the energy is not known.
        seconds: from its beginning to the last reading.
    """

    ask: Asked
    joules: float | None = None
    hottest: float | None = None
    throttled: list[str] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0
    _last: Telemetry | None = None
    _asked_at: float = 0.0
    _cost: float = 0.0

    def due(self) -> bool:
        """Return whether it is time to ask again."""
        wait = max(EVERY_SECONDS, _SHARE * self._cost)
        return not self.reason and time.monotonic() - self._asked_at >= wait

    def read(self) -> None:
        """Ask the device and add up what came since the last time."""
        began = time.monotonic()
        told = self.ask()
        now = time.monotonic()
        before, since = self._last, now - self._asked_at
        self._last, self._asked_at, self._cost = told, now, now - began
        self.reason = told.reason
        if told.temperature_celsius is not None:
            self.hottest = max(told.temperature_celsius, self.hottest or told.temperature_celsius)
        self.throttled += [each for each in told.throttled if each not in self.throttled]
        if before is None or told.reason:
            return
        self.seconds += since
        used = consumed(before, told, since)
        if used is not None:
            self.joules = (self.joules or 0.0) + used

    def begin(self) -> None:
        """Count from this moment on."""
        self.read()
        self.joules, self.seconds = None, 0.0

    def covers(self, seconds: float) -> bool:
        """Return whether what was metered took about so long as the steps did.

        Steps are seen as their lines are read, some tenths of a second late: of steps that are over
        sooner the energy is not known.
        """
        return abs(self.seconds - seconds) <= _OFF * seconds


def consumed(before: Telemetry, after: Telemetry, seconds: float) -> float | None:
    """Return the joules between two readings; None where they don't say.

    A counter that has begun again is seen by its fall. Power is taken to have changed evenly.
    """
    if before.energy_joules is not None and after.energy_joules is not None:
        used = after.energy_joules - before.energy_joules
        if used >= 0:
            return used
        return None if after.energy_wraps_joules is None else used + after.energy_wraps_joules
    if before.power_watts is not None and after.power_watts is not None:
        return (before.power_watts + after.power_watts) / 2 * seconds
    return None


def asking(registry: Registry, device: DeviceFacts) -> Asked:
    """Return a function that asks a device's backend; what it fails by is the reason."""

    def ask() -> Telemetry:
        try:
            hook = registry.backends[device.backend].mst_telemetry
            told: Telemetry | None = guarded(lambda: hook(device=device), _ASK_SECONDS)
            fault = type_fault(told, Telemetry | None, "its answer")
            if fault:
                raise PluginError(fault)
        except MstError as error:
            return Telemetry(reason=f"mst_telemetry of {device.backend}: {error}")
        if told is None:
            return Telemetry(reason=f"the {device.backend} backend has no mst_telemetry")
        return told

    return ask


def load_average() -> float:
    """Return how many processes ran or wanted to, on average over the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return 0.0


def busy_share(seconds: float = _BUSY_SECONDS, stat: Path = Path("/proc/stat")) -> float:
    """Return the share of this machine's cores that anybody uses; 0 where nobody can say.

    Source: proc_stat(5): user, nice, system, idle, iowait, …
    """
    before = _times(stat)
    time.sleep(seconds)
    after = _times(stat)
    if before is None or after is None or after[0] == before[0]:
        return 0.0
    return round(1 - (after[1] - before[1]) / (after[0] - before[0]), 3)


def _times(stat: Path) -> tuple[int, int] | None:
    try:
        values = [int(each) for each in stat.read_text().split("\n")[0].split()[1:]]
        return sum(values), values[3] + values[4]
    except (OSError, ValueError, IndexError):
        return None
