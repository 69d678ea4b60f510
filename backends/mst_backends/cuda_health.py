"""What is wrong with an NVIDIA card at this moment, in sentences for its user."""

from __future__ import annotations

from mst.facts import DeviceFacts
from mst_backends.nvidia_card import Card, Listing
from mst_backends.torch_build import TorchBuild, kernel_fault

# Of a card's memory, what a desktop or an idle context may hold unremarked.
UNREMARKED_SHARE = 0.10
# The clocks fall at 0; a card under load keeps more than this below.
LEAST_MARGIN_CELSIUS = 5


def problems(device: DeviceFacts, listing: Listing, torch: TorchBuild) -> list[str]:
    """Return what a user should know of one device before a long job.

    Args:
        device: as the probe described it.
        listing: what the driver says at this moment.
        torch: the installed torch.
    """
    card = next((card for card in listing.cards if _holds(card, device.uuid)), None)
    if card is None:
        return [f"the driver no longer lists it ({listing.failure or 'others are there'}): reboot"]
    found = [*_memory_repairs(card), *_slowed(card)]
    held = _held(device)
    if held is not None and held[0] > UNREMARKED_SHARE * held[1]:
        gib = f"{held[0] / 2**30:.1f} of {held[1] / 2**30:.1f} GiB"
        found.append(f"other processes hold {gib} of its memory: see `nvidia-smi`")
    # Where torch has kernels for no card at all, the probe says it once.
    faults = {other.uuid: kernel_fault(torch, other.capability) for other in listing.cards}
    if faults[card.uuid] and not all(faults.values()):
        found.append(faults[card.uuid])
    return found


def machine_problems(listing: Listing, note: str) -> list[str]:
    """Return what concerns no listed device alone; `note` is of the visible devices."""
    found = [f"{listing.source} says: {words}" for words in listing.problems]
    idle = [str(card.index) for card in listing.cards if card.mig and not card.instances]
    if idle and len(idle) < len(listing.cards):
        found.append(
            f"GPU {', '.join(idle)} is in MIG mode without instances, so CUDA does not show it: "
            "`sudo nvidia-smi mig -cgi PROFILE -C` makes one, `sudo nvidia-smi -mig 0` ends it"
        )
    return [*found, *([note] if note else [])]


def _holds(card: Card, uuid: str) -> bool:
    return uuid in (card.uuid, *(instance.uuid for instance in card.instances))


def _memory_repairs(card: Card) -> list[str]:
    found = []
    if card.uncorrected_errors:
        found.append(
            f"{card.uncorrected_errors} uncorrectable memory errors since the driver was loaded: "
            f"results can be wrong; reset it with `sudo nvidia-smi -r -i {card.index}`"
        )
    if card.repair_pending:
        found.append(
            "bad memory waits to be taken out of use: "
            f"reset it with `sudo nvidia-smi -r -i {card.index}`, or reboot"
        )
    if card.repair_failed:
        found.append("bad memory could not be taken out of use, no spares are left: replace it")
    return found


def _slowed(card: Card) -> list[str]:
    if card.throttled:
        return [f"slowed at this moment ({', '.join(card.throttled)}): check cooling and power"]
    if card.margin_celsius is not None and card.margin_celsius <= LEAST_MARGIN_CELSIUS:
        return [f"{card.margin_celsius} °C below its thermal slowdown: check cooling"]
    return []


def _held(device: DeviceFacts) -> tuple[int, int] | None:
    """Return held and total bytes, as of the probe."""
    total, free = device.memory_total_bytes, device.memory_free_bytes
    return None if total is None or free is None else (total - free, total)
