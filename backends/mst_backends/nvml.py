"""Ask the NVIDIA driver through nvidia-ml-py, NVIDIA's own binding of its management library."""

from __future__ import annotations

import ctypes
import importlib
import re
from collections import Counter
from dataclasses import replace
from typing import Any

from mst.facts import Telemetry
from mst_backends.nvidia_card import Card, Instance, Listing, pci_order, throttle_words

LIBRARY = "libnvidia-ml.so.1"
# Names as in `nvidia-smi topo -m`, for NVML_TOPOLOGY_* of nvml.h.
TOPOLOGY = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
# FP32 lanes of one multiprocessor: CUDA C++ Programming Guide, arithmetic instructions. NVML
# counts lanes ("cores"), torch and everybody else multiprocessors.
CORES_PER_MULTIPROCESSOR = {
    (6, 0): 64, (6, 1): 128, (7, 0): 64, (7, 5): 64, (8, 0): 64, (8, 6): 128, (8, 9): 128,
    (9, 0): 128, (10, 0): 128, (12, 0): 128,
}  # fmt: skip
VOLATILE = 0  # NVML_VOLATILE_ECC
UNCORRECTED = 1  # NVML_MEMORY_ERROR_TYPE_UNCORRECTED
SLOWDOWN = 1  # NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
SWITCH = 2  # NVML_NVLINK_DEVICE_TYPE_SWITCH
MAX_LINKS = 36  # NVML_NVLINK_MAX_LINKS


def read(topology: bool = True) -> Listing:
    """Return the cards as NVML describes them, or why it does not.

    Args:
        topology: also ask how the cards are linked.
    """
    try:
        # A tenth of a millisecond; importing the binding takes 50 where there is no driver.
        ctypes.CDLL(LIBRARY)
    except OSError:
        return Listing("NVML", failure=f"{LIBRARY} of the NVIDIA driver is not here")
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        return Listing("NVML", failure=f"nvidia-ml-py cannot be imported: {error}")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Listing("NVML", failure=f"NVML: {error}")
    try:
        return _listing(nvml, topology)
    # An older package of the same import name lacks some functions.
    except (nvml.NVMLError, AttributeError, UnicodeDecodeError) as error:
        return Listing("NVML", failure=f"NVML: {error}")
    finally:
        nvml.nvmlShutdown()


def telemetry(uuid: str) -> Telemetry:
    """Return the energy, heat and throttling of the card that the driver calls `uuid`."""
    if uuid.startswith("MIG-"):
        return Telemetry(reason="NVML counts the energy of a whole card, not of a MIG instance")
    try:
        ctypes.CDLL(LIBRARY)
        nvml = importlib.import_module("pynvml")
    except (OSError, ImportError) as error:
        return Telemetry(reason=f"NVML: {error}")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Telemetry(reason=f"NVML: {error}")
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        # Millijoules since the driver was loaded, from Volta on, and milliwatts.
        energy = _ask(nvml, "nvmlDeviceGetTotalEnergyConsumption", handle)
        power = _ask(nvml, "nvmlDeviceGetPowerUsage", handle)
        unknown = "NVML gives neither energy nor power of this card"
        return Telemetry(
            energy_joules=None if energy is None else energy / 1000,
            power_watts=None if power is None else power / 1000,
            temperature_celsius=_ask(nvml, "nvmlDeviceGetTemperature", handle, 0),
            throttled=throttle_words(_throttle_bits(nvml, handle)),
            reason=unknown if energy is None and power is None else "",
        )
    except (nvml.NVMLError, AttributeError) as error:
        return Telemetry(reason=f"NVML: {error}")
    finally:
        nvml.nvmlShutdown()


def _listing(nvml: Any, topology: bool) -> Listing:
    cards, handles, problems = [], {}, []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            cards.append(_card(nvml, handle, index))
            handles[index] = handle
        except nvml.NVMLError as error:
            problems.append(f"GPU {index}: {error}")
    if topology and len(cards) > 1:
        links = _links(nvml, cards, handles)
        cards = [replace(card, links=links[card.index]) for card in cards]
    cuda = _ask(nvml, "nvmlSystemGetCudaDriverVersion_v2")
    return Listing(
        source="NVML",
        cards=pci_order(cards),
        driver=_ask(nvml, "nvmlSystemGetDriverVersion") or "",
        cuda=None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
        problems=tuple(problems),
        failure="" if cards else "; ".join(problems) or "No devices were found",
    )


def _card(nvml: Any, handle: Any, index: int) -> Card:
    """Return one card; raises when the driver has lost it."""
    total, reserved, free = _memory(nvml, handle)
    capability = _ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle)
    pci = _ask(nvml, "nvmlDeviceGetPciInfo", handle)
    mig = (_ask(nvml, "nvmlDeviceGetMigMode", handle) or [0])[0] == 1
    remapped = _ask(nvml, "nvmlDeviceGetRemappedRows", handle) or (0, 0, 0, 0)
    retired = _ask(nvml, "nvmlDeviceGetRetiredPagesPendingStatus", handle)
    return Card(
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        pci_bus_id=pci.busId if pci else "",
        capability=capability,
        memory_total_bytes=total,
        memory_reserved_bytes=reserved,
        memory_free_bytes=free,
        multiprocessors=_multiprocessors(nvml, handle, capability),
        mig=mig,
        instances=_instances(nvml, handle) if mig else (),
        uncorrected_errors=_ask(nvml, "nvmlDeviceGetTotalEccErrors", handle, UNCORRECTED, VOLATILE),
        repair_pending=bool(remapped[2] or retired),
        repair_failed=bool(remapped[3]),
        throttled=throttle_words(_throttle_bits(nvml, handle)),
        margin_celsius=_margin(nvml, handle),
    )


def _memory(nvml: Any, handle: Any) -> tuple[int | None, int | None, int | None]:
    """Return total, reserved and free bytes; drivers before 510 do not tell what is reserved."""
    second = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle, nvml.nvmlMemory_v2)
    if second is not None:
        return second.total, second.reserved, second.free
    first = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    return (None, None, None) if first is None else (first.total, None, first.free)


def _multiprocessors(nvml: Any, handle: Any, capability: tuple[int, int] | None) -> int | None:
    cores = _ask(nvml, "nvmlDeviceGetNumGpuCores", handle)
    lanes = CORES_PER_MULTIPROCESSOR.get(capability) if capability else None
    return cores // lanes if cores and lanes else None


def _throttle_bits(nvml: Any, handle: Any) -> int | None:
    # Drivers before 535 know the call by its first name only.
    events = _ask(nvml, "nvmlDeviceGetCurrentClocksEventReasons", handle)
    if events is None:
        events = _ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    return None if events is None else int(events)


def _margin(nvml: Any, handle: Any) -> int | None:
    """Return the degrees below the slowdown; cards before Ada give a threshold in its place."""
    margin = _ask(nvml, "nvmlDeviceGetMarginTemperature", handle)
    if margin is not None:
        return int(margin)
    slowdown = _ask(nvml, "nvmlDeviceGetTemperatureThreshold", handle, SLOWDOWN)
    now = _ask(nvml, "nvmlDeviceGetTemperature", handle, 0)
    return slowdown - now if slowdown and now is not None else None


def _instances(nvml: Any, handle: Any) -> tuple[Instance, ...]:
    instances = []
    for position in range(_ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
        part = _ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, position)
        if part is None:
            continue
        uuid = _ask(nvml, "nvmlDeviceGetUUID", part)
        if uuid is None:
            continue
        total, reserved, free = _memory(nvml, part)
        attributes = _ask(nvml, "nvmlDeviceGetAttributes", part)
        instances.append(
            Instance(
                uuid=uuid,
                profile=_profile(_ask(nvml, "nvmlDeviceGetName", part) or "", attributes),
                memory_total_bytes=total - (reserved or 0) if total is not None else None,
                memory_free_bytes=free,
                multiprocessors=attributes.multiprocessorCount if attributes else None,
            )
        )
    return tuple(instances)


def _profile(name: str, attributes: Any) -> str:
    """Return "3g.20gb", which stands at the end of "NVIDIA A100-SXM4-40GB MIG 3g.20gb"."""
    match = re.search(r"MIG (\S+)$", name)
    if match:
        return match.group(1)
    if attributes is None:
        return ""
    gib = round(attributes.memorySizeMB / 1024)
    return f"{attributes.gpuInstanceSliceCount}g.{gib}gb"


def _links(nvml: Any, cards: list[Card], handles: dict[int, Any]) -> dict[int, dict[int, str]]:
    """Return how every card reaches every other one, as `nvidia-smi topo -m` names it."""
    direct = {card.index: _nvlinks(nvml, handles[card.index]) for card in cards}
    links: dict[int, dict[int, str]] = {card.index: {} for card in cards}
    for one in cards:
        for other in cards:
            if one.index == other.index:
                continue
            # Through a switch a card reaches each other one with all of its links.
            switched = min(direct[one.index]["switch"], direct[other.index]["switch"])
            count = switched or direct[one.index][other.pci_bus_id.upper()]
            pair = (handles[one.index], handles[other.index])
            level = _ask(nvml, "nvmlDeviceGetTopologyCommonAncestor", *pair)
            word = f"NV{count}" if count else TOPOLOGY.get(level, "")
            if word:
                links[one.index][other.index] = word
    return links


def _nvlinks(nvml: Any, handle: Any) -> Counter[str]:
    """Return the active links by the PCI bus of the card at their other end, or "switch"."""
    ends: Counter[str] = Counter()
    for link in range(MAX_LINKS):
        active = _ask(nvml, "nvmlDeviceGetNvLinkState", handle, link)
        if active is None:
            break
        if not active:
            continue
        if _ask(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, link) == SWITCH:
            ends["switch"] += 1
            continue
        remote = _ask(nvml, "nvmlDeviceGetNvLinkRemotePciInfo", handle, link)
        if remote is not None:
            ends[remote.busId.upper()] += 1
    return ends


def _ask(nvml: Any, function: str, *arguments: Any) -> Any:
    """Return the driver's answer, or None when this card or driver does not have it."""
    try:
        return getattr(nvml, function)(*arguments)
    except nvml.NVMLError:
        return None
