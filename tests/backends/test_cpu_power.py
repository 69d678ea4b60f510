"""A CPU's energy and heat, from trees of /sys as kernels show them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mst_backends import cpu
from mst_backends.cpu_power import telemetry

RAPL = {
    "intel-rapl:0/name": "package-0", "intel-rapl:0/energy_uj": "5000000",
    "intel-rapl:0/max_energy_range_uj": "262143328850",
    "intel-rapl:0:0/name": "core", "intel-rapl:0:0/energy_uj": "4000000",
    "intel-rapl:1/name": "package-1", "intel-rapl:1/energy_uj": "7000000",
    "intel-rapl:2/name": "psys", "intel-rapl:2/energy_uj": "99000000",
}  # fmt: skip
HEAT = {
    "hwmon0/name": "nvme", "hwmon0/temp1_input": "99000",
    "hwmon1/name": "k10temp", "hwmon1/temp1_input": "61250", "hwmon1/temp3_input": "64000",
}  # fmt: skip


def tree(root: Path, powercap: dict[str, str], hwmon: dict[str, str]) -> Path:
    for folder, files in (("powercap", powercap), ("hwmon", hwmon)):
        for name, text in files.items():
            path = root / "sys/class" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
    return root


def test_packages_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    found = telemetry(tree(tmp_path, RAPL, HEAT))

    assert (found.energy_joules, found.energy_wraps_joules) == (12.0, 262143.32885)
    assert (found.temperature_celsius, found.reason) == (64.0, "")


def test_a_virtual_machine_says_why_it_has_none(tmp_path: Path) -> None:
    found = telemetry(tree(tmp_path, {}, {}))

    assert (found.energy_joules, found.temperature_celsius) == (None, None)
    assert "a virtual machine, or no RAPL driver" in found.reason


def test_a_counter_that_root_alone_may_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path, RAPL, {})

    def refused(self: Path, *_: object, **__: object) -> str:
        # As root, who runs these tests, may read everything.
        if self.name == "energy_uj":
            raise PermissionError
        return "package-0"

    monkeypatch.setattr(Path, "read_text", refused)
    found = telemetry(root)

    assert found.energy_joules is None
    assert f"only root may read {root}/sys/class/powercap/intel-rapl:0/energy_uj" in found.reason


def test_a_counter_that_is_no_number_is_told(tmp_path: Path) -> None:
    found = telemetry(tree(tmp_path, RAPL | {"intel-rapl:0/energy_uj": "?"}, {}))

    assert "energy_uj can't be read: ValueError" in found.reason


def test_the_hook_answers_on_this_machine() -> None:
    found = cpu.mst_telemetry()

    assert (found.energy_joules is None) == bool(found.reason)
