"""A device's peak for the time forecast: the declared one, or that of the nearest known CPU core.

A backend declares a peak only where it knows the core, for nothing may be faster than a declared
peak. A forecast needs less: cores with the same instructions differ by a factor that is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from mst.facts import DeviceFacts

# Operations of one core in a cycle, by the best instructions that it has, as of the nearest core
# that is known (backends/mst_backends/cpu_peak.py): Sapphire Rapids, Zen 4, a Neoverse with two
# 128-bit units; Zen 4, Zen 2 and Haswell, the same Neoverse.
PER_CYCLE = {
    "bfloat16": {"amx_bf16": 1024, "avx512_bf16": 64, "bf16": 64},
    "float32": {
        "avx512f": 32, "avx512_bf16": 32, "amx_bf16": 64, "avx2": 32, "asimd": 16, "sve": 16,
        "bf16": 16,
    },
}  # fmt: skip
# Dot products of bfloat16 do two multiply-adds in each float32 lane. Two Zen 4 cores multiplied
# 2,048 squared at 0.42 TFLOPS (benchmarks/results/2026-11-27-train-throughput.jsonl): 48 to 57
# operations a cycle at 4.4 to 3.7 GHz.
BFLOAT16_OVER_FLOAT32 = 2.0
CLOCK_HERTZ = 3e9
# Cores with these instructions have one or two units, of half or the whole of their width.
CORE_UNCERTAINTY = 2.0
# Clocks lie between 2 and 4.5 GHz.
CLOCK_UNCERTAINTY = 1.5


@dataclass(frozen=True)
class Peak:
    """What a device can multiply at the most.

    Attributes:
        flop_per_second: of all its cores.
        uncertainty: factor by which it may be wrong either way; 1 where it was declared.
        source: of a figure that was not declared.
    """

    flop_per_second: float
    uncertainty: float = 1.0
    source: str = ""


def peak_of(device: DeviceFacts, dtype: str) -> Peak | None:
    """Return a device's peak in a dtype, declared or of the nearest CPU; None where there is none.

    A CPU without instructions for bfloat16 has none in it: how torch emulates them there has
    little to do with its peak.

    Args:
        device: any.
        dtype: torch name.
    """
    declared = device.peak_tflops.get(dtype)
    if declared is not None:
        return Peak(declared * 1e12)
    if device.backend != "cpu":
        return None
    found = [(name, PER_CYCLE.get(dtype, {}).get(name, 0)) for name in device.features]
    feature, most = max(found, key=lambda each: each[1], default=("", 0))
    if not most:
        return None
    single = device.peak_tflops.get("float32")
    if dtype == "bfloat16" and single is not None and feature != "amx_bf16":
        return Peak(
            single * 1e12 * BFLOAT16_OVER_FLOAT32,
            CORE_UNCERTAINTY,
            f"assumed, as of other cores with {feature}: {BFLOAT16_OVER_FLOAT32:g} times float32's",
        )
    return Peak(
        most * CLOCK_HERTZ * (device.compute_units or 1),
        CORE_UNCERTAINTY * CLOCK_UNCERTAINTY,
        f"assumed, as of other cores with {feature}: {most} operations a cycle, 3 GHz",
    )
