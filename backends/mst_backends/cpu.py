"""The CPU as a device: cores and memory that are really ours, and what its cores can multiply.

A vendor may take this module as an example. torch knows the CPU by itself, so there is no
`mst_activate` here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sysconfig
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from mst.facts import Capabilities, DeviceFacts, Probe, Telemetry
from mst.hookspecs import hookimpl
from mst.memory.runtime import heap_environment
from mst_backends.cgroups import cpu_quota, memory_limits
from mst_backends.cpu_peak import peak_tflops
from mst_backends.cpu_power import telemetry

# Names as in /proc/cpuinfo: "flags" on x86, "Features" on ARM.
FEATURES = {
    "x86_64": ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    "aarch64": ("asimd", "bf16", "i8mm", "sve"),
}
BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}
# ARM servers have no "model name". From util-linux, sys-utils/lscpu-arm.c.
ARM_CORES = {
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd49"): "Neoverse-N2",
    ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x48", "0xd01"): "TaiShan-v110 (Kunpeng 920)",
    ("0x48", "0xd02"): "TaiShan-v120",
}
# torch, its optimizer and the smallest model take about this much (SmolLM2-135M, LoRA: 1.1 GiB).
LEAST_FREE_BYTES = 2 * 2**30
# The first version whose 8-bit optimizers run on a CPU (bitsandbytes pull request 1901); its layers
# in 4 and 8 bits did before.
LEAST_BITSANDBYTES = (0, 50)


@hookimpl
def mst_backend_name() -> str:
    """Return "cpu"."""
    return "cpu"


@hookimpl
def mst_probe() -> Probe:
    """Return this machine's processors as one device."""
    usable = importlib.util.find_spec("torch") is not None
    reason = "" if usable else "torch is not installed: python -m pip install torch"
    return Probe(found=True, usable=usable, devices=(read_facts(),), reason=reason)


@hookimpl
def mst_capabilities() -> Capabilities:
    """Return what torch does on any CPU, and what bitsandbytes adds when it is installed."""
    quantized = _bitsandbytes() >= LEAST_BITSANDBYTES
    zero = ("zero1", "zero2", "zero3") if importlib.util.find_spec("deepspeed") else ()
    return Capabilities(
        torch_device="cpu",
        distributed_backend="gloo",
        strategies=("single", "ddp", *zero),
        quantization=("none", "nf4", "int8") if quantized else ("none",),
        attention=("sdpa", "eager"),
        # Paged moments need memory that device and host share: bitsandbytes has none here.
        optimizers=("adamw_torch", "adamw_8bit") if quantized else ("adamw_torch",),
        compiler=_compiler(os.environ),
    )


def _compiler(environ: Mapping[str, str]) -> str:
    """Return the C++ compiler that torch would call, "" where it or Python's headers are missing.

    Source: torch 2.13.0, torch/_inductor/config.py (cpp.cxx) and cpp_builder.py.
    """
    name = environ.get("CXX", "g++")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return name if shutil.which(name) and headers.is_file() else ""


@hookimpl
def mst_environment(devices: Sequence[DeviceFacts]) -> Mapping[str, str]:
    """Return one thread a core for each library that has a pool of its own, and malloc's settings.

    By default the pools count the machine's cores: in a container with 4 of 64 they would start 64.
    """
    # A plan takes a roomy heap where its forecast fits.
    environment = heap_environment("tight")
    threads = sum(device.compute_units or 0 for device in devices)
    if threads:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment |= {name: str(threads) for name in names}
    return environment


@hookimpl
def mst_health(device: DeviceFacts) -> Sequence[str]:
    """Return what makes training on this CPU slow or likely to be killed."""
    problems = []
    if device.arch == "x86_64" and "avx2" not in device.features:
        problems.append("no AVX2: torch falls back to slow kernels; use a newer CPU to train")
    free = device.memory_free_bytes
    if free is not None and free < LEAST_FREE_BYTES:
        problems.append(
            f"{free / 2**30:.1f} GiB of memory free ({device.sources['memory_free_bytes']}): "
            "end other processes, or raise the container's limit"
        )
    return problems


@hookimpl
def mst_telemetry() -> Telemetry:
    """Return what the processors' own counters say of their energy, and their heat."""
    return telemetry()


def read_facts(
    root: Path = Path("/"), affinity: Collection[int] | None = None, machine: str = ""
) -> DeviceFacts:
    """Return the CPU as its kernel describes it.

    Args:
        root: where /proc and /sys are; another tree in tests.
        affinity: logical CPUs that this process may run on; asked of the kernel when None.
        machine: architecture as in `uname -m`; asked of the kernel when "".
    """
    machine = machine or os.uname().machine
    logical = _affinity() if affinity is None else affinity
    first_cpu = _fields(root / "proc/cpuinfo")
    flags = first_cpu.get("flags", first_cpu.get("Features", "")).split()
    features = tuple(name for name in FEATURES.get(machine, ()) if name in flags)
    cores, cores_source = _usable_cores(root, logical)
    total, free, total_source, free_source = _memory(root)
    peaks, peaks_source = peak_tflops(root, first_cpu, features, cores, min(logical, default=0))
    return DeviceFacts(
        backend="cpu",
        index=0,
        name=_name(first_cpu, machine),
        arch=machine,
        memory_total_bytes=total,
        memory_free_bytes=free,
        dtypes=_dtypes(features),
        compute_units=cores,
        features=features,
        peak_tflops=peaks,
        sources={
            "memory_total_bytes": f"probe: {total_source}",
            "memory_free_bytes": f"probe: {free_source}",
            "compute_units": f"probe: {cores_source}",
            "peak_tflops": peaks_source,
        },
    )


def _dtypes(features: Collection[str]) -> tuple[str, ...]:
    # Without instructions of its own, bf16 is unpacked to fp32 and packed again. GFLOPS of a
    # 1024³ product on one core of an AMD EPYC (Zen 5), torch 2.13, bf16 / fp32: 435 / 98 with
    # avx512_bf16; with ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI 77 / 97, with AVX2 1 / 93.
    if BF16_FEATURES.intersection(features):
        return ("bfloat16", "float32")
    return ("float32", "bfloat16")


def _affinity() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _usable_cores(root: Path, logical: Collection[int]) -> tuple[int, str]:
    """Return how many threads to compute with, and what limits them.

    Two hyper-threads share one set of vector units, so a core counts once. A quota is rounded
    down: a thread that is throttled holds up all others at the next barrier.
    """
    cores = {_core(root, cpu) for cpu in logical}
    quota = cpu_quota(root)
    if quota is not None and quota.cpus < len(cores):
        return max(1, int(quota.cpus)), f"{quota.source}, {quota.cpus:g} CPUs of {len(cores)} cores"
    return len(cores), f"{len(cores)} physical cores of {len(logical)} logical CPUs allowed"


def _core(root: Path, cpu: int) -> str:
    """Return a text that all hyper-threads of one core share."""
    file = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _memory(root: Path) -> tuple[int | None, int | None, str, str]:
    """Return total and free bytes, each the least of the machine's and its control groups'."""
    machine = _fields(root / "proc/meminfo")
    if "MemTotal" not in machine:
        return None, None, "no /proc/meminfo", "no /proc/meminfo"
    total = (_kib(machine["MemTotal"]), "/proc/meminfo MemTotal")
    # Kernels before 3.14 do not have MemAvailable.
    available = "MemAvailable" if "MemAvailable" in machine else "MemFree"
    free = (_kib(machine[available]), f"/proc/meminfo {available}")
    limits = memory_limits(root)
    total = min([total, *((one.limit_bytes, one.source) for one in limits)])
    free = min([free, *((one.free_bytes, one.source) for one in limits)])
    return total[0], free[0], total[1], free[1]


def _kib(text: str) -> int:
    return int(text.removesuffix("kB")) * 1024


def _bitsandbytes() -> tuple[int, int]:
    """Return the installed version, without importing it; (0, 0) for none."""
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)
    numbers = re.match(r"(\d+)\.(\d+)", found)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _name(fields: Mapping[str, str], machine: str) -> str:
    if "model name" in fields:
        return fields["model name"]
    if "CPU part" not in fields:
        return machine
    maker, part = fields.get("CPU implementer", "?"), fields["CPU part"]
    return ARM_CORES.get((maker, part), f"ARM implementer {maker} part {part}")


def _fields(file: Path) -> dict[str, str]:
    """Return the "name: value" lines of a /proc file, up to the first empty line."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = text.partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}
