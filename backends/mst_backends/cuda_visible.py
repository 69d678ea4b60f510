"""Which cards and MIG instances CUDA shows to a process, and in which order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mst_backends.nvidia_card import Card, Instance

VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Unit:
    """What CUDA takes for one device: a card, or one MIG instance of a card."""

    card: Card
    instance: Instance | None = None


@dataclass(frozen=True)
class Visible:
    """The devices that CUDA counts from 0.

    Attributes:
        units: in CUDA's order.
        hidden: why there are none although the machine has some; "" otherwise.
        note: what a user of the variable should know, "" when all is plain.
    """

    units: tuple[Unit, ...]
    hidden: str = ""
    note: str = ""


def all_units(cards: Sequence[Card]) -> tuple[Unit, ...]:
    """Return the devices by PCI bus; a card in MIG mode is there as its instances only."""
    return tuple(
        unit
        for card in cards
        for unit in (
            [Unit(card, instance) for instance in card.instances] if card.mig else [Unit(card)]
        )
    )


def visible(cards: Sequence[Card], value: str | None, order: str = "") -> Visible:
    """Return the devices that `CUDA_VISIBLE_DEVICES` leaves.

    As CUDA does (CUDA C++ Programming Guide, environment variables): the list ends at the first
    entry that is no device, a device named twice hides all, and the start of a UUID will do.

    Args:
        cards: the machine's, by PCI bus.
        value: of `CUDA_VISIBLE_DEVICES`; None when it is not set.
        order: of `CUDA_DEVICE_ORDER`, "" when it is not set.
    """
    if value is None:
        return Visible(all_units(cards))
    units: list[Unit] = []
    rest = ""
    entries = [entry.strip() for entry in value.split(",")]
    for entry in entries:
        unit = _unit(entry, cards)
        if unit is None:
            rest = entry
            break
        if unit in units:
            return _hidden(value, f"it names {entry} twice, which CUDA takes for none", cards)
        units.append(unit)
    if not units:
        return _hidden(value, f"{rest!r} is no GPU here" if rest not in ("", "-1") else "", cards)
    notes = []
    if rest:
        notes.append(f"{VARIABLE}={value!r}: CUDA ignores {rest!r}, no GPU here, and what follows")
    names = {card.name for card in cards}
    if entries[0][:1].isdigit() and len(names) > 1 and order != "PCI_BUS_ID":
        notes.append(
            f"{VARIABLE}={value!r} counts cards of different kinds; CUDA counts the fastest first "
            "unless CUDA_DEVICE_ORDER=PCI_BUS_ID, mst by PCI bus: set that too, or use UUIDs"
        )
    return Visible(tuple(units), note="; ".join(notes))


def _unit(entry: str, cards: Sequence[Card]) -> Unit | None:
    """Return the device that one entry names, or None."""
    if entry.startswith(("GPU-", "MIG-")):
        named = [
            unit
            for card in cards
            for unit in [Unit(card), *(Unit(card, instance) for instance in card.instances)]
            if (unit.instance or card).uuid.lower().startswith(entry.lower())
        ]
        return _first_instance(named[0]) if len(named) == 1 else None
    # CUDA reads the number an entry begins with, as C's strtoul does.
    number = re.match(r"\d+", entry)
    if number is None or int(number[0]) >= len(cards):
        return None
    return _first_instance(Unit(cards[int(number[0])]))


def _first_instance(unit: Unit) -> Unit | None:
    """Return what CUDA shows of a card named as a whole: of one in MIG mode its first instance."""
    if unit.instance is not None or not unit.card.mig:
        return unit
    return Unit(unit.card, unit.card.instances[0]) if unit.card.instances else None


def _hidden(value: str, why: str, cards: Sequence[Card]) -> Visible:
    names = [(unit.instance or unit.card).uuid for unit in all_units(cards)]
    reason = f"{VARIABLE}={value!r} hides every GPU" + (f" ({why})" if why else "")
    example = f", such as {names[0]}" if names else ""
    return Visible((), hidden=f"{reason}: unset it, or name a line of `nvidia-smi -L`{example}")
