"""Huawei's Ascend chips through torch_npu, told from device files, `npu-smi` and CANN's variables.

Probing imports no torch: torch_npu without CANN's libraries breaks `import torch` itself.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from mst.catalogue import Figure, cited, find
from mst.facts import Capabilities, DeviceFacts, Probe, Telemetry
from mst.hookspecs import hookimpl
from mst_backends import npu_smi
from mst_backends.ascend_health import logical_number, problems, telemetry
from mst_backends.ascend_soc import dtypes_of, is_known, soc_name
from mst_backends.cann import (
    DRIVER,
    TOOLKITS,
    Cann,
    Extension,
    driver_version,
    find_cann,
    find_extension,
    same_release,
)

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
# Stands for "/" in tests and in containers that mount the host's tree elsewhere.
ROOT = "MST_ASCEND_ROOT"
# A hook has 5 s; `npu-smi info` took up to 2 s on machines of 16 chips in public reports.
SMI_SECONDS = 4.0
# How long the probe and the health checks of all devices share one reading.
FRESH_SECONDS = 5.0


@hookimpl
def mst_backend_name() -> str:
    """Return "ascend"."""
    return "ascend"


@hookimpl
def mst_probe() -> Probe:
    """Return the chips that ASCEND_RT_VISIBLE_DEVICES leaves visible, and whether torch can run."""
    root = _root()
    if not device_nodes(root):
        return without_chip(find_cann(root, os.environ), find_extension())
    return read_probe(root, os.environ, _recent_reading(_smi(root), _moment()), find_extension())


@hookimpl
def mst_capabilities(device: DeviceFacts) -> Capabilities:
    """Return what torch_npu does on an Ascend chip."""
    return Capabilities(
        torch_device="npu",
        distributed_backend="hccl",
        strategies=("single", "ddp", "zero1", "zero2", "zero3"),
        # bitsandbytes 0.50 names npu as supported but ships no kernels for it; QLoRA there is
        # reported to fail (github.com/hiyouga/LLaMA-Factory/issues/6452).
        quantization=("none",),
        # torch_npu's own scaled_dot_product_attention calls npu_fusion_attention from the 910B1 on
        # for half precision, and computes by matmul and softmax else (op-plugin,
        # ScaledDotProductAttentionKernelNpuOpApi.cpp): the fused kernel when there, and every
        # dtype. transformers' "flash_attention_2" is the same kernel (its
        # integrations/npu_flash_attention.py), but fails in float32 and before the 910B1.
        attention=("sdpa", "eager"),
        visible_devices_env=VISIBLE,
    )


@hookimpl
def mst_environment(devices: Sequence[DeviceFacts]) -> Mapping[str, str]:
    """Return what narrows a worker to `devices` and prepares collectives and the allocator."""
    environment = {
        # CANN reads ascending numbers only
        # (hiascend.com, canncommercial/900/maintenref/envvar/envref_07_0028.html).
        VISIBLE: ",".join(str(one) for one in sorted(logical_number(each) for each in devices)),
        # DeepSpeed chooses its accelerator by what can be imported, so it is always told.
        "DS_ACCELERATOR": "npu",
    }
    if len(devices) > 1:
        # Seconds in which ranks wait for each other, 120 by default and 7200 at most
        # (…/envref_07_0149.html); loading a large model from a cold disk takes longer than two
        # minutes on one rank and less on another.
        environment["HCCL_CONNECT_TIMEOUT"] = "600"
    if all(_can_expand_segments(each) for each in devices):
        # Rows differ in length; segments that grow in place keep memory from fragmenting.
        environment["PYTORCH_NPU_ALLOC_CONF"] = "expandable_segments:True"
    return environment


@hookimpl
def mst_activate() -> None:
    """Import torch_npu, which registers the device "npu" with torch."""
    importlib.import_module("torch_npu")


@hookimpl
def mst_health(device: DeviceFacts) -> Sequence[str]:
    """Return a chip's alarm, its heat, and who else holds its memory."""
    reading = _recent_reading(_smi(_root()), _moment())
    return problems(device, reading)


@hookimpl
def mst_telemetry(device: DeviceFacts) -> Telemetry:
    """Return the power that npu-smi shows of a chip, and its heat."""
    return telemetry(device, _recent_reading(_smi(_root()), int(time.monotonic())))


def device_nodes(root: Path) -> tuple[int, ...]:
    """Return the numbers of the chips' device files, ascending."""
    names = (file.name for file in (root / "dev").glob("davinci[0-9]*"))
    return tuple(sorted(int(name[7:]) for name in names if name[7:].isdigit()))


def without_chip(cann: Cann, extension: Extension) -> Probe:
    """Return the probe of a machine without an Ascend chip."""
    reason = "no /dev/davinci*: no Ascend chip, its driver is not loaded, or a container lacks it"
    if extension.installed and cann.missing:
        reason += (
            f"; torch-npu {extension.version} is installed without CANN ({cann.missing}) and breaks"
            " `import torch`: python -m pip uninstall torch-npu"
        )
        if cann.set_env:
            reason += f"; or, to keep it: source {cann.set_env}"
    return Probe(found=False, usable=False, reason=reason)


def read_probe(
    root: Path, environ: Mapping[str, str], reading: npu_smi.Reading, extension: Extension
) -> Probe:
    """Return the probe of a machine that has device files of Ascend chips.

    Args:
        root: "/", or a tree that stands for it.
        environ: the process's variables.
        reading: what npu-smi said.
        extension: torch_npu and torch.
    """
    driver = driver_version(root) or reading.info.version
    if reading.error:
        unknown = (_unknown_device(index, driver) for index, _ in enumerate(device_nodes(root)))
        return Probe(True, False, tuple(unknown), _without_smi(root, reading.error))
    chips = npu_smi.by_logical_number(reading)
    seen = [one for one in visible_numbers(environ.get(VISIBLE), len(chips)) if one in chips]
    if not seen:
        reason = (
            f"{VISIBLE}={environ.get(VISIBLE)!r} hides all {len(chips)} chips: unset it, or list"
            f" some of 0 to {len(chips) - 1}, ascending and without spaces"
        )
        return Probe(True, False, reason=reason)
    devices = [_device(index, one, chips[one], reading, driver) for index, one in enumerate(seen)]
    linked = tuple(
        replace(each, links=_links(one, seen, chips, reading))
        for each, one in zip(devices, seen, strict=True)
    )
    reason = _unusable(find_cann(root, environ), extension)
    return Probe(True, not reason, linked, reason)


def visible_numbers(text: str | None, count: int) -> tuple[int, ...]:
    """Return which of `count` chips ASCEND_RT_VISIBLE_DEVICES leaves, by logical number.

    As CANN and torch_npu read it: up to the first character that is neither digit nor comma, up to
    the first number that does not exist, and nothing at all when it does not ascend.
    """
    if text is None:
        return tuple(range(count))
    numbers: list[int] = []
    readable = re.match(r"[0-9,]*", text)
    for word in readable.group().split(",") if readable else ():
        if not word or int(word) >= count:
            break
        if numbers and int(word) <= numbers[-1]:
            return ()
        numbers.append(int(word))
    return tuple(numbers)


def _device(
    index: int, number: int, chip: npu_smi.Chip, reading: npu_smi.Reading, driver: str
) -> DeviceFacts:
    soc = soc_name(chip.name, reading.boards)
    total, used = chip.memory_total_bytes, chip.memory_used_bytes
    entry = find("ascend", soc, total)
    peaks = {} if entry is None else entry.peak_tflops
    bandwidth = None if entry is None else entry.bandwidth_bytes_per_second
    return DeviceFacts(
        backend="ascend",
        index=index,
        name=soc,
        arch=soc,
        memory_total_bytes=total,
        memory_free_bytes=None if total is None or used is None else total - used,
        dtypes=dtypes_of(soc),
        peak_tflops={dtype: figure.value for dtype, figure in peaks.items()},
        bandwidth_bytes_per_second=None if bandwidth is None else bandwidth.value,
        uuid=f"npu-{number}",
        driver=driver,
        sources=_sources(soc, chip, list(peaks.values()), bandwidth),
    )


def _sources(
    soc: str, chip: npu_smi.Chip, peaks: Sequence[Figure], bandwidth: Figure | None
) -> dict[str, str]:
    """Return where each figure of a chip is from, and which are unknown."""
    column = f"probe: npu-smi info, {chip.memory_column or 'which shows none'}"
    dtypes = "table: torch_npu 2.13.0, is_bf16_supported by the chip's name"
    if not is_known(soc):
        dtypes = f"unknown: {soc} is not in torch_npu 2.13.0's table; only what every chip can"
    figures = {"peak_tflops": peaks[0] if peaks else None, "bandwidth_bytes_per_second": bandwidth}
    return {
        "memory_total_bytes": column,
        "memory_free_bytes": f"{column}, total less used",
        "dtypes": dtypes,
        **{
            name: f"unknown: the catalogue has none of {soc}" if figure is None else cited(figure)
            for name, figure in figures.items()
        },
    }


def _unknown_device(index: int, driver: str) -> DeviceFacts:
    """Return a chip of which only the device file is known."""
    return DeviceFacts(
        backend="ascend",
        index=index,
        name="Ascend, model unknown",
        arch="Ascend",
        memory_total_bytes=None,
        memory_free_bytes=None,
        dtypes=dtypes_of(""),
        uuid=f"npu-{index}",
        driver=driver,
        sources={"dtypes": "unknown: npu-smi did not name the chip; only what every chip can"},
    )


def _links(
    number: int,
    seen: Sequence[int],
    chips: Mapping[int, npu_smi.Chip],
    reading: npu_smi.Reading,
) -> dict[str, str]:
    """Return how chip `number` reaches the other visible ones, by their names in mst."""
    topology = reading.topology
    row = topology.get(npu_smi.label_of(chips[number], topology), {})
    named = ((f"ascend:{i}", npu_smi.label_of(chips[one], topology)) for i, one in enumerate(seen))
    return {name: row[label] for name, label in named if label in row}


def _without_smi(root: Path, error: str) -> str:
    """Return what to do when npu-smi tells nothing, which is the driver's matter."""
    if not (root / "dev/davinci_manager").exists():
        return (
            f"{error}; /dev/davinci_manager is missing: load the driver, or give the container"
            " --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc"
        )
    if not (root / DRIVER).is_dir():
        return (
            f"{error}; /{DRIVER} is missing: install Huawei's NPU driver, or mount it into the"
            f" container: -v /{DRIVER}:/{DRIVER} -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi"
        )
    return (
        f"{error}; run it by hand: the driver and its firmware may not fit each other, a reboot be"
        " due after an upgrade, or your user not be in the group HwHiAiUser"
    )


def _unusable(cann: Cann, extension: Extension) -> str:
    """Return why torch can't drive the chips, "" when it can."""
    torch_release = extension.torch_version.partition("+")[0]
    if not extension.torch_version:
        return "torch is not installed: python -m pip install torch torch-npu"
    if not extension.installed:
        return f"torch_npu is not installed: python -m pip install torch-npu=={torch_release}"
    if not same_release(extension.version, extension.torch_version):
        return (
            f"torch-npu {extension.version} is built for another torch than"
            f" {extension.torch_version}: python -m pip install torch-npu=={torch_release}"
        )
    if cann.missing:
        script = cann.set_env or f"/{TOOLKITS[0]}/set_env.sh (install CANN first)"
        return f"CANN is not loaded, {cann.missing}: source {script}"
    return ""


def _can_expand_segments(device: DeviceFacts) -> bool:
    # From driver 23.0.0 on, on training chips (hiascend.com, Pytorch/600, Envir_009.html).
    major = device.driver.partition(".")[0]
    return device.arch.startswith("Ascend910") and major.isdigit() and int(major) >= 23


def _root() -> Path:
    return Path(os.environ.get(ROOT) or "/")


def _smi(root: Path) -> str:
    """Return npu-smi's path, "" when it is not there; some shells lack the driver's folders."""
    folders = [str(root / one) for one in ("usr/local/sbin", "usr/local/bin")]
    return shutil.which("npu-smi") or shutil.which("npu-smi", path=os.pathsep.join(folders)) or ""


def _moment() -> int:
    return int(time.monotonic() / FRESH_SECONDS)


@lru_cache(maxsize=1)
def _recent_reading(command: str, moment: int) -> npu_smi.Reading:
    """Return one reading for the probe and all health checks that follow within seconds."""
    if not command:
        return npu_smi.Reading(error="npu-smi is not on PATH")
    return npu_smi.read(command, SMI_SECONDS)
