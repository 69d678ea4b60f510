"""NVIDIA cards through CUDA: what the driver says of them, and whether the installed torch fits.

torch knows CUDA by itself, so there is no `mst_activate` here.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mst import catalogue
from mst.facts import Capabilities, DeviceFacts, Probe, Telemetry
from mst.hookspecs import hookimpl
from mst_backends import nvidia_smi, nvml
from mst_backends.cuda_health import machine_problems, problems
from mst_backends.cuda_visible import VARIABLE, Unit, Visible, all_units, visible
from mst_backends.nvidia_card import Listing
from mst_backends.torch_build import (
    TorchBuild,
    build_fault,
    driver_fault,
    installed_torch,
    kernel_fault,
    numbers,
)

# Matrix units multiply these from the compute capability beside them: CUDA C++ Programming
# Guide, feature support by compute capability.
FEATURES = {"tensor_cores": (7, 0), "tf32": (8, 0), "fp8": (8, 9), "fp4": (10, 0)}
# README of flash-attention 2, NVIDIA CUDA support: Ampere, Ada or Hopper.
LEAST_FLASH_ATTENTION_2 = (8, 0)
# bitsandbytes 0.49's README: sm60 is the minimum. Transformers' documentation of bitsandbytes,
# hardware: NF4 from Pascal on, LLM.int8() from Turing on.
LEAST_NF4, LEAST_INT8 = (6, 0), (7, 5)
# Triton's README, compatibility: NVIDIA GPUs of compute capability 8.0 and later.
LEAST_TRITON = (8, 0)
# accelerate's check_cuda_p2p_ib_support: drivers before this one offer peer-to-peer copies on
# these cards, which have none, and NCCL hangs.
NO_PEER_TO_PEER, DRIVER_KNOWS_IT = re.compile(r"GeForce RTX 40\d\d"), "550.40.07"
# What to do about what the driver says, by a part of its words.
ADVICE = {
    "version mismatch": "reboot, or unload the nvidia kernel modules and load them again: the "
    "running module is older than the installed driver",
    "communicate with the NVIDIA driver": "sudo modprobe nvidia; when that fails, install the "
    "driver again for the running kernel",
    "Driver Not Loaded": "sudo modprobe nvidia; when that fails, install the driver again for "
    "the running kernel",
    "No devices were found": "`sudo dmesg | grep NVRM` says why the driver refused the card",
    "did not answer": "`sudo dmesg | grep -i xid` says whether a card hangs; where it is only "
    "slow, `sudo nvidia-smi -pm 1` keeps the driver awake",
    "lost": "reboot; when it is lost again, check its power and its seat",
    "device handle": "reboot; when it is lost again, check its power and its seat",
    "is not here": "install the NVIDIA driver; start a container with --gpus all; in WSL install "
    "the driver in Windows",
}  # fmt: skip


@hookimpl
def mst_backend_name() -> str:
    """Return "cuda"."""
    return "cuda"


@hookimpl
def mst_probe() -> Probe:
    """Return the NVIDIA cards and MIG instances that CUDA would show to this process."""
    return describe(read_cards(), os.environ, installed_torch(), hardware())


@hookimpl
def mst_capabilities(device: DeviceFacts) -> Capabilities:
    """Return what torch and the installed kernels do on a card of this compute capability."""
    capability = _capability(device.arch)
    flash = capability >= LEAST_FLASH_ATTENTION_2 and _installed("flash_attn")
    quantized = _installed("bitsandbytes")
    # CUDA shows a process one MIG instance, and instances have no peer-to-peer copies: NVIDIA MIG
    # user guide, application considerations and device enumeration.
    mig = device.uuid.startswith("MIG-")
    return Capabilities(
        torch_device="cuda",
        distributed_backend="nccl",
        strategies=("single",) if mig else ("single", "ddp", "zero1", "zero2", "zero3"),
        quantization=(
            "none",
            *(("nf4",) if quantized and capability >= LEAST_NF4 else ()),
            *(("int8",) if quantized and capability >= LEAST_INT8 else ()),
        ),
        attention=(*(("flash_attention_2",) if flash else ()), "sdpa", "eager"),
        visible_devices_env=VARIABLE,
        # The kernels are in the same library, for the same cards as NF4's.
        optimizers=(
            "adamw_torch",
            *(("adamw_8bit", "paged_adamw_8bit") if quantized and capability >= LEAST_NF4 else ()),
        ),
        liger=capability >= LEAST_TRITON and _installed("liger_kernel") and _installed("triton"),
    )


@hookimpl
def mst_health(device: DeviceFacts) -> Sequence[str]:
    """Return what the driver says at this moment that a long job would suffer from."""
    listing, torch = read_cards(topology=False), installed_torch()
    found = problems(device, listing, torch)
    if device.index == 0:
        found += machine_problems(listing, _visible(listing, os.environ).note)
    return found


@hookimpl
def mst_telemetry(device: DeviceFacts) -> Telemetry:
    """Return what NVML counts of the card's energy, and what slows it down."""
    return nvml.telemetry(device.uuid)


@hookimpl
def mst_environment(devices: Sequence[DeviceFacts]) -> Mapping[str, str]:
    """Return variables that show a worker its cards only, and settings of the allocator."""
    return worker_environment(devices, os.environ, wsl=Path("/dev/dxg").exists())


def read_cards(topology: bool = True) -> Listing:
    """Return what the driver lists, by its library or else by the text of nvidia-smi."""
    library = nvml.read(topology)
    if library.cards:
        return library
    text = nvidia_smi.read(topology)
    if not text.cards and "is not found" in text.failure:
        return replace(library, failure=f"{library.failure}; {text.failure}")
    return text


def hardware(root: Path = Path("/")) -> str:
    """Return where an NVIDIA card is seen without its driver's tools, or "".

    Args:
        root: where /dev and /sys are; another tree in tests.
    """
    nodes = sorted((root / "dev").glob("nvidia[0-9]*"))
    if nodes:
        return f"/dev/{nodes[0].name}"
    # /dev/dxg stands for a card of any vendor; Windows adds the library with NVIDIA's driver.
    if (root / "dev/dxg").exists() and (root / "usr/lib/wsl/lib/libcuda.so.1").exists():
        return "/dev/dxg with NVIDIA's library (WSL)"
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            driver = (device / "driver").resolve().name if (device / "driver").exists() else "none"
            return f"an NVIDIA card at PCI {device.name} (kernel driver: {driver})"
    return ""


def describe(
    listing: Listing, environ: Mapping[str, str], torch: TorchBuild, seen: str = ""
) -> Probe:
    """Return the probe of what the driver listed.

    Args:
        listing: the driver's answer.
        environ: for `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER`.
        torch: the installed torch.
        seen: where a card is seen without the driver, "" for nowhere.
    """
    if not listing.cards:
        if not seen and not listing.problems:
            reason = f"no NVIDIA card (no /dev/nvidia*, none on the PCI bus): {listing.failure}"
            return Probe(found=False, usable=False, reason=reason)
        return Probe(True, False, reason=f"{seen or 'the driver'}: {_advised(listing.failure)}")
    shown = _visible(listing, environ)
    units = shown.units or all_units(listing.cards) or tuple(Unit(card) for card in listing.cards)
    faults = [
        build_fault(torch),
        driver_fault(torch, listing.driver, listing.cuda),
        _no_kernels(units, torch),
        shown.hidden if all_units(listing.cards) else _no_instances(listing),
    ]
    return Probe(
        found=True,
        usable=not any(faults),
        devices=_devices(units, listing),
        reason="; ".join(fault for fault in faults if fault),
    )


def worker_environment(
    devices: Sequence[DeviceFacts], environ: Mapping[str, str], wsl: bool = False
) -> dict[str, str]:
    """Return the variables of a worker that drives `devices`.

    Args:
        devices: what the job uses.
        environ: the user's; a setting there is kept.
        wsl: this is a Linux in Windows.
    """
    # CUDA counts the fastest card first unless told otherwise; a UUID means one card in any order.
    fixed = {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        VARIABLE: ",".join(device.uuid or str(device.index) for device in devices),
    }
    # 8 buffers of 4 MiB; torch.use_deterministic_algorithms refuses cuBLAS without (its docs).
    wanted = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    # Without it, batches of different lengths leave holes that no tensor fits. In WSL the driver
    # fails at it: pytorch issue 192330.
    if not wsl and "PYTORCH_CUDA_ALLOC_CONF" not in environ:
        wanted["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if len(devices) > 1 and any(_offers_false_peers(device) for device in devices):
        wanted |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    return fixed | {name: value for name, value in wanted.items() if name not in environ}


def _offers_false_peers(device: DeviceFacts) -> bool:
    named = NO_PEER_TO_PEER.search(device.name) is not None
    return named and bool(device.driver) and numbers(device.driver) < numbers(DRIVER_KNOWS_IT)


def _visible(listing: Listing, environ: Mapping[str, str]) -> Visible:
    order = environ.get("CUDA_DEVICE_ORDER", "")
    return visible(listing.cards, environ.get(VARIABLE), order)


def _no_kernels(units: Sequence[Unit], torch: TorchBuild) -> str:
    """Return why torch has kernels for none of them; of some only, `mst_health` tells."""
    faults = [kernel_fault(torch, unit.card.capability) for unit in units]
    return faults[0] if all(faults) else ""


def _no_instances(listing: Listing) -> str:
    indices = ", ".join(str(card.index) for card in listing.cards)
    return (
        f"GPU {indices} in MIG mode without instances: make one with `sudo nvidia-smi mig -cgi "
        "PROFILE -C`, or leave the mode with `sudo nvidia-smi -mig 0`"
    )


def _advised(failure: str) -> str:
    advice = next((advice for words, advice in ADVICE.items() if words in failure), "")
    return f"{failure}: {advice or 'install the driver again when `nvidia-smi` fails too'}"


def _devices(units: Sequence[Unit], listing: Listing) -> tuple[DeviceFacts, ...]:
    names = {
        unit.card.index: f"cuda:{position}"
        for position, unit in enumerate(units)
        if unit.instance is None
    }
    return tuple(
        _facts(position, unit, listing, names if unit.instance is None else {})
        for position, unit in enumerate(units)
    )


def _facts(position: int, unit: Unit, listing: Listing, names: Mapping[int, str]) -> DeviceFacts:
    """Return one device; `names` are the other whole cards by the driver's index."""
    card, instance = unit.card, unit.instance
    chip = catalogue.find("cuda", card.name, card.memory_total_bytes)
    arch = "sm{}{}".format(*card.capability) if card.capability else chip.arch if chip else ""
    if instance is None:
        usable = card.memory_total_bytes
        total = None if usable is None else usable - (card.memory_reserved_bytes or 0)
        name, uuid, free = card.name, card.uuid, card.memory_free_bytes
        multiprocessors = card.multiprocessors
    else:
        name, uuid = f"{card.name} MIG {instance.profile}", instance.uuid
        total, free = instance.memory_total_bytes, instance.memory_free_bytes
        multiprocessors = instance.multiprocessors
    sources = _asked(listing.source, total, free, multiprocessors)
    figures = _figures(card.name, chip, instance is not None)
    return DeviceFacts(
        backend="cuda",
        index=position,
        name=name,
        arch=arch,
        memory_total_bytes=total,
        memory_free_bytes=free,
        dtypes=_dtypes(_capability(arch)),
        compute_units=multiprocessors,
        features=tuple(word for word, least in FEATURES.items() if _capability(arch) >= least),
        peak_tflops=figures[0],
        bandwidth_bytes_per_second=figures[1],
        uuid=uuid,
        driver=listing.driver,
        links={names[index]: word for index, word in card.links.items() if index in names},
        sources=sources | figures[2],
    )


def _asked(
    source: str, total: int | None, free: int | None, multiprocessors: int | None
) -> dict[str, str]:
    """Return where the driver's figures come from, and of memory that it does not give them."""
    silent = f"unknown: {source} does not say"
    sources = {
        "memory_total_bytes": f"probe: {source}, less what the driver keeps",
        "memory_free_bytes": f"probe: {source}",
    }
    sources = {
        name: silent if value is None else sources[name]
        for name, value in zip(sources, (total, free), strict=True)
    }
    return sources if multiprocessors is None else sources | {"compute_units": f"probe: {source}"}


def _figures(
    name: str, chip: catalogue.KnownChip | None, part: bool
) -> tuple[dict[str, float], float | None, dict[str, str]]:
    """Return peaks, bandwidth and where they come from; unknown ones say why."""
    if part or chip is None:
        why = (
            "a MIG instance is a part of its card"
            if part
            else f"{name!r} is not in the catalogue; `mst devices --known` lists it"
        )
        return {}, None, {"peak_tflops": f"unknown: {why}"}
    sources = {}
    origins = {f"{figure.source}, {figure.date}" for figure in chip.peak_tflops.values()}
    sources["peak_tflops"] = (
        f"table: {'; '.join(sorted(origins))}" if origins else f"unknown: {chip.note or chip.name}"
    )
    bandwidth = chip.bandwidth_bytes_per_second
    if bandwidth is not None:
        sources["bandwidth_bytes_per_second"] = catalogue.cited(bandwidth)
    peaks = {dtype: figure.value for dtype, figure in chip.peak_tflops.items()}
    return peaks, None if bandwidth is None else bandwidth.value, sources


def _capability(arch: str) -> tuple[int, int]:
    """Return (8, 0) for "sm80", and (0, 0) for an unknown one."""
    digits = arch.removeprefix("sm")
    return (int(digits[:-1]), int(digits[-1])) if digits.isdigit() else (0, 0)


def _dtypes(capability: tuple[int, int]) -> tuple[str, ...]:
    # torch.cuda.is_bf16_supported() counts emulation and can be true on Turing; matrix units
    # multiply bf16 from sm80 and fp16 from sm70.
    if capability >= (8, 0):
        return ("bfloat16", "float16", "float32")
    if capability >= (7, 0):
        return ("float16", "float32")
    return ("float32",)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
