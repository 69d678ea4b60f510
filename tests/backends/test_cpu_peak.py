"""The CPU's peak, on recorded processors: known cores have one, others say why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from mst.facts import DeviceFacts
from mst_backends import cpu

EPYC_9005 = (
    "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n"
    "model name\t: AMD EPYC\ncpu MHz\t\t: 2600.000\n"
    "flags\t\t: fpu sse2 avx avx2 avx512f avx512_bf16 hypervisor\n\n"
)
XEON_6430 = (
    "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n"
    "model name\t: Intel(R) Xeon(R) Gold 6430\ncpu MHz\t\t: 2100.000\n"
    "flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n\n"
)
EPYC_7763 = EPYC_9005.replace(": 26", ": 25").replace("\t\t: 2\n", "\t\t: 1\n")
NEOVERSE_V1 = (
    "processor\t: 0\nFeatures\t: fp asimd sve bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
)
FREQUENCY = "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"


def facts(
    root: Path, cpuinfo: str, files: Mapping[str, str] | None = None, machine: str = "x86_64"
) -> DeviceFacts:
    for name, text in {"proc/cpuinfo": cpuinfo, **(files or {})}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return cpu.read_facts(root, affinity=range(4), machine=machine)


def test_a_peak_is_operations_a_cycle_times_cores_times_the_highest_clock(tmp_path: Path) -> None:
    device = facts(tmp_path, EPYC_9005, {FREQUENCY: "4500000\n"})

    # 4 cores of 4.5 GHz, 128 and 64 operations a cycle.
    assert device.peak_tflops == pytest.approx({"bfloat16": 2.304, "float32": 1.152})
    assert device.sources["peak_tflops"].startswith("table: operations a cycle bfloat16 128")
    assert f"probe: 4 cores, /{FREQUENCY}" in device.sources["peak_tflops"]


def test_without_cpufreq_the_clock_is_the_base_clock_and_its_boost(tmp_path: Path) -> None:
    device = facts(tmp_path, EPYC_9005)

    assert device.peak_tflops["bfloat16"] == pytest.approx(128 * 4 * 2.6 * 1.7 / 1000)
    assert "probe: 4 cores, /proc/cpuinfo cpu MHz, times 1.7" in device.sources["peak_tflops"]


def test_amx_multiplies_sixteen_times_as_much_as_avx512(tmp_path: Path) -> None:
    device = facts(tmp_path, XEON_6430, {FREQUENCY: "3400000\n"})

    assert device.peak_tflops["bfloat16"] == pytest.approx(1024 * 4 * 3.4 / 1000)
    assert device.peak_tflops["float32"] == pytest.approx(64 * 4 * 3.4 / 1000)
    assert "TDPBF16PS" in device.sources["peak_tflops"]


def test_what_a_hypervisor_hides_does_not_count(tmp_path: Path) -> None:
    plain = EPYC_9005.replace(" avx512f avx512_bf16", "")
    device = facts(tmp_path, plain, {FREQUENCY: "4000000\n"})

    assert device.peak_tflops == pytest.approx({"float32": 32 * 4 * 4 / 1000})


def test_cores_without_bf16_instructions_have_no_bf16_peak(tmp_path: Path) -> None:
    device = facts(tmp_path, EPYC_7763.replace(" avx512f avx512_bf16", ""))

    assert set(device.peak_tflops) == {"float32"}


def test_an_arm_core_is_known_by_its_part(tmp_path: Path) -> None:
    device = facts(tmp_path / "v1", NEOVERSE_V1, {FREQUENCY: "2600000\n"}, "aarch64")
    other = facts(
        tmp_path / "other", NEOVERSE_V1.replace("0xd40", "0xfff"), {FREQUENCY: "2600000\n"},
        "aarch64",
    )  # fmt: skip

    assert device.peak_tflops == pytest.approx({"bfloat16": 1.3312, "float32": 0.3328})
    assert other.peak_tflops == {}
    assert other.sources["peak_tflops"].startswith("unknown: operations a cycle of this core")


@pytest.mark.parametrize(
    ("cpuinfo", "why"),
    [
        (EPYC_9005.replace(": 26", ": 99"), "unknown: operations a cycle of this core"),
        (EPYC_9005.replace("model\t\t: 2\n", ""), "unknown: operations a cycle of this core"),
        (EPYC_9005.replace("cpu MHz\t\t: 2600.000\n", ""), "unknown: no /sys/devices"),
        ("", "unknown: operations a cycle of this core"),
    ],
)
def test_an_unknown_core_or_clock_leaves_the_peak_unknown(
    tmp_path: Path, cpuinfo: str, why: str
) -> None:
    device = facts(tmp_path, cpuinfo)

    assert device.peak_tflops == {}
    assert device.sources["peak_tflops"].startswith(why)


def test_no_product_on_this_machine_is_faster_than_its_peak() -> None:
    import time

    import torch

    device = cpu.read_facts()
    left = {name: torch.ones(1024, 1024, dtype=getattr(torch, name)) for name in device.peak_tflops}
    for name, peak in device.peak_tflops.items():
        best = 1e9
        for _ in range(4):
            began = time.perf_counter()
            torch.mm(left[name], left[name])
            best = min(best, time.perf_counter() - began)

        assert 2 * 1024**3 / best / 1e12 < 1.05 * peak
