"""What a CPU's cores can multiply at the most: operations a cycle, by core, times its clock.

A core that is not listed has no peak: cores with the same flags differ in how many units they have.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mst.catalogue import find

# Without cpufreq, as in most virtual machines, the kernel shows the base clock. EPYC 9005 boost to
# 1.2 to 1.7 times theirs (2.6 to 4.5 GHz for a 9655, AMD's product table); a virtual machine that
# showed 2.6 GHz ran at 3.98. A peak is the most that there can be, so the largest is taken.
BOOST = 1.7
FLOPS = "stackoverflow.com/questions/15655835 (FLOPs per cycle by microarchitecture)"
TEARDOWN = "numberworld.org/blogs/2024_8_7_zen5_avx512_teardown"


@dataclass(frozen=True)
class Core:
    """Operations of one core in a cycle, a multiply-add counted as two.

    Attributes:
        vector: float32, in vectors of 256 bits (128 on ARM).
        wide: float32 with AVX-512; 0 without.
        bfloat16: with AVX512-BF16 or ARM's bf16; 0 when not known.
        source: of all three.
    """

    vector: int
    wide: int
    bfloat16: int
    source: str


ZEN1 = Core(16, 0, 0, f"{FLOPS}: AMD Ryzen")
ZEN2 = Core(32, 0, 0, f"{FLOPS}: AMD Zen 2 and later")
# 512-bit instructions take two cycles of Zen 3's 256-bit units.
ZEN4 = Core(32, 32, 0, f"{TEARDOWN}: Zen 4")
# Two 512-bit multiply-adds; VDPBF16PS does two in each float32 lane, and torch's bf16 product was
# measured at 117 operations a cycle.
ZEN5 = Core(32, 64, 128, f"{TEARDOWN}: Zen 5")
ZEN5_MOBILE = Core(32, 32, 0, f"{TEARDOWN}: Zen 5, Strix Point")
HASWELL = Core(32, 0, 0, f"{FLOPS}: Haswell to Coffee Lake")
# Some Xeons have one 512-bit unit only: then this is twice the truth.
XEON = Core(32, 64, 0, f"{FLOPS}: Skylake-X, two 512-bit units")

# By vendor, family and models of /proc/cpuinfo, as the Linux kernel's intel-family.h and AMD's
# revision guides number them.
X86: tuple[tuple[str, int, Collection[int], Core], ...] = (
    ("AuthenticAMD", 0x17, range(0x30), ZEN1),
    ("AuthenticAMD", 0x17, range(0x30, 0x100), ZEN2),
    ("AuthenticAMD", 0x19, (*range(0x10, 0x20), *range(0x60, 0xB0)), ZEN4),
    ("AuthenticAMD", 0x19, range(0x60), ZEN2),
    ("AuthenticAMD", 0x1A, (*range(0x20), *range(0x40, 0x50)), ZEN5),
    ("AuthenticAMD", 0x1A, range(0x20, 0x40), ZEN5_MOBILE),
    ("GenuineIntel", 6, (0x3C, 0x3D, 0x3F, 0x45, 0x46, 0x47, 0x4E, 0x4F, 0x56, 0x5E), HASWELL),
    ("GenuineIntel", 6, (0x8E, 0x9E, 0xA5, 0xA6), HASWELL),
    # Skylake to Cooper Lake, Ice Lake, Sapphire, Emerald and Granite Rapids.
    ("GenuineIntel", 6, (0x55, 0x6A, 0x6C, 0x8F, 0xCF, 0xAD, 0xAE), XEON),
)

# ARM's cores, by implementer and part. A 128-bit BFMMLA does 32 operations where FMLA does 8.
V1 = Core(32, 0, 128, "community.arm.com, Neoverse V1 platform: two 256-bit vector units, bfloat16")
ARM = {("0x41", "0xd40"): V1}


def peak_tflops(
    root: Path, fields: Mapping[str, str], features: Collection[str], cores: int, cpu: int
) -> tuple[dict[str, float], str]:
    """Return dense peaks by dtype name, and where they come from or why they are unknown.

    Args:
        root: where /proc and /sys are.
        fields: of /proc/cpuinfo, of one logical CPU.
        features: instruction sets that count.
        cores: that may be used.
        cpu: one of the logical CPUs that may be used.
    """
    core = _core(fields)
    per_cycle = {} if core is None else _per_cycle(core, features)
    sources = [] if core is None else [core.source]
    amx = find("cpu", "amx_bf16") if "amx_bf16" in features else None
    if amx is not None:
        per_cycle["bfloat16"] = amx.flop_per_cycle["bfloat16"].value
        sources.append(amx.flop_per_cycle["bfloat16"].source)
    if not per_cycle:
        return {}, "unknown: operations a cycle of this core are not in the table"
    hertz, clock_source = _clock(root, fields, cpu)
    if hertz is None:
        return {}, f"unknown: {clock_source}"
    peaks = {name: flop * cores * hertz / 1e12 for name, flop in per_cycle.items()}
    told = ", ".join(f"{name} {flop:g}" for name, flop in per_cycle.items())
    return peaks, (
        f"table: operations a cycle {told} from {'; '.join(sources)};"
        f" probe: {cores} cores, {clock_source}"
    )


def _core(fields: Mapping[str, str]) -> Core | None:
    vendor = fields.get("vendor_id")
    if vendor is None:
        return ARM.get((fields.get("CPU implementer", ""), fields.get("CPU part", "")))
    try:
        family, model = int(fields.get("cpu family", "")), int(fields.get("model", ""))
    except ValueError:
        return None
    found = (
        core
        for maker, series, models, core in X86
        if (maker, series) == (vendor, family) and model in models
    )
    return next(found, None)


def _per_cycle(core: Core, features: Collection[str]) -> dict[str, float]:
    """Return operations a cycle by dtype name; a hypervisor may hide what the core has."""
    found: dict[str, float] = {}
    if core.bfloat16 and {"avx512_bf16", "bf16"}.intersection(features):
        found["bfloat16"] = core.bfloat16
    if core.wide and "avx512f" in features:
        found["float32"] = core.wide
    elif {"avx2", "asimd"}.intersection(features):
        found["float32"] = core.vector
    return found


def _clock(root: Path, fields: Mapping[str, str], cpu: int) -> tuple[float | None, str]:
    """Return the highest clock in hertz, and where it was read."""
    file = f"sys/devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq"
    try:
        return int((root / file).read_text(encoding="ascii")) * 1e3, f"/{file}"
    except (OSError, ValueError):
        pass
    try:
        shown = float(fields["cpu MHz"]) * 1e6
    except (KeyError, ValueError):
        return None, f"no /{file}, and no cpu MHz in /proc/cpuinfo"
    return shown * BOOST, f"/proc/cpuinfo cpu MHz, times {BOOST:g} for boost, which it hides"
