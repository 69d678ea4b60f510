"""What an NVIDIA driver says of the cards, whichever way it was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Bits of the clock event reasons that slow a card against its user's will. Idle clocks, a power
# cap and application clocks are settings, and left out. From nvml.h, nvmlClocksEventReasons.
THROTTLE_BITS = {
    0x08: "hardware slowdown",
    0x20: "thermal slowdown by the driver",
    0x40: "thermal slowdown by the hardware",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Instance:
    """One MIG instance: a part of a card that CUDA sees as a device of its own.

    Attributes:
        uuid: what `CUDA_VISIBLE_DEVICES` calls it.
        profile: compute and memory slices, as in "3g.20gb".
        memory_total_bytes: None where the driver does not say.
        memory_free_bytes: None where the driver does not say.
        multiprocessors: how many of the card's it has.
    """

    uuid: str
    profile: str
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    multiprocessors: int | None = None


@dataclass(frozen=True)
class Card:
    """One card; what the driver does not say is None.

    Attributes:
        index: the driver's number, as in `nvidia-smi -i`.
        uuid: "GPU-…".
        name: the product name, letter for letter.
        pci_bus_id: "00000000:C1:00.0"; `CUDA_DEVICE_ORDER=PCI_BUS_ID` orders by it.
        capability: compute capability, (8, 0) for sm80.
        memory_total_bytes: all of it.
        memory_reserved_bytes: what the driver and error correction keep from every process.
        memory_free_bytes: what a process could have at this moment.
        multiprocessors: streaming multiprocessors.
        mig: MIG mode is on: CUDA sees the instances and never the card itself.
        instances: the MIG instances, in the driver's order.
        links: how each other card is reached, by its index: "NV12", "PIX", "SYS".
        uncorrected_errors: of memory, since the driver was loaded.
        repair_pending: memory rows or pages will be replaced at the next reset.
        repair_failed: no spare rows are left.
        throttled: words of `THROTTLE_BITS` that hold at this moment.
        margin_celsius: how far the temperature is below the slowdown.
    """

    index: int
    uuid: str
    name: str
    pci_bus_id: str = ""
    capability: tuple[int, int] | None = None
    memory_total_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    memory_free_bytes: int | None = None
    multiprocessors: int | None = None
    mig: bool = False
    instances: tuple[Instance, ...] = ()
    links: Mapping[int, str] = field(default_factory=dict)
    uncorrected_errors: int | None = None
    repair_pending: bool = False
    repair_failed: bool = False
    throttled: tuple[str, ...] = ()
    margin_celsius: int | None = None


@dataclass(frozen=True)
class Listing:
    """One answer of the driver.

    Attributes:
        source: who was asked: "NVML" or "nvidia-smi".
        cards: in the order of their PCI bus numbers.
        driver: version of the driver, "" when unknown.
        cuda: the newest CUDA that the driver library runs, where known.
        problems: cards that the driver lists but cannot reach, in its words.
        failure: why there are no cards, in the driver's words; "" when there are.
    """

    source: str
    cards: tuple[Card, ...] = ()
    driver: str = ""
    cuda: tuple[int, int] | None = None
    problems: tuple[str, ...] = ()
    failure: str = ""


def throttle_words(bits: int | None) -> tuple[str, ...]:
    """Return what slows a card, of the driver's clock event reasons."""
    return tuple(word for bit, word in THROTTLE_BITS.items() if (bits or 0) & bit)


def pci_order(cards: list[Card]) -> tuple[Card, ...]:
    """Return the cards by domain, bus and device number."""
    return tuple(sorted(cards, key=lambda card: (card.pci_bus_id.upper(), card.index)))
