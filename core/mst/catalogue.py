"""Known chips: what data sheets and drivers say of them, each figure with its source and date.

`catalogue.toml` beside this module holds the figures. What no source says, or what sources
contradict each other about, is left out there and is None or absent here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# nvidia-smi shows 22.5 of an A10's 24 GiB and 15.8 of a V100's 16 GiB: error correction and the
# driver keep some. The next size of the same product is always at least a third away.
MEMORY_TOLERANCE = 0.15

SOURCE_KEYS = {"title", "date"}
REQUIRED = {"backend", "name", "names", "arch", "dtypes"}
SCALED = {
    # key in the file: attribute, and what one of the file's units is in the attribute's
    "memory_mib": ("memory_bytes", 2**20),
    "bandwidth_gb_per_second": ("bandwidth_bytes_per_second", 10**9),
    "link_gb_per_second": ("link_bytes_per_second", 10**9),
}
TABLES = {"peak_tflops", "flop_per_cycle"}
CHIP_KEYS = REQUIRED | set(SCALED) | TABLES | {"note"}


@dataclass(frozen=True)
class Figure:
    """A number and where it came from.

    Attributes:
        value: in the unit that the attribute holding it names.
        source: the document and the place in it, or an address.
        date: ISO date on which the figure was read there, or of the document itself.
    """

    value: float
    source: str
    date: str


def cited(figure: Figure) -> str:
    """Return a figure's source as `DeviceFacts.sources` gives it."""
    return f"table: {figure.source}, {figure.date}"


@dataclass(frozen=True)
class KnownChip:
    """A chip of the catalogue; None and absent keys are unknown.

    Attributes:
        backend: the backend that drives it, as in `--device`.
        name: short name that tells it from all others of its backend.
        names: what drivers call it, letter for letter.
        arch: as in `DeviceFacts.arch`.
        memory_bytes: what the driver shows, else the data sheet's size.
        bandwidth_bytes_per_second: of the memory.
        peak_tflops: dense, by torch dtype name and "tf32"; matrix units with fp32 accumulation
            where there are any, "float32" without them.
        dtypes: torch dtype names for training, best first.
        link_bytes_per_second: of all links to other chips together, both directions.
        flop_per_cycle: of one CPU core, by torch dtype name.
        note: what a user should know besides, such as why a figure is unknown.
    """

    backend: str
    name: str
    names: tuple[str, ...]
    arch: str
    memory_bytes: Figure | None
    bandwidth_bytes_per_second: Figure | None
    peak_tflops: Mapping[str, Figure]
    dtypes: tuple[str, ...]
    link_bytes_per_second: Figure | None = None
    flop_per_cycle: Mapping[str, Figure] = field(default_factory=dict)
    note: str = ""


@lru_cache(maxsize=1)
def known_chips() -> tuple[KnownChip, ...]:
    """Return every chip of the catalogue, in its order."""
    return parse(files("mst").joinpath("catalogue.toml").read_text(encoding="utf-8"))


def find(backend: str, name: str, memory_bytes: int | None = None) -> KnownChip | None:
    """Return the chip that a driver calls `name`, or None when it is unknown or ambiguous.

    Args:
        backend: name of the backend.
        name: exactly what the driver reports.
        memory_bytes: what the device has in all, where known. Chips whose known size differs by
            more than 15 % are passed over, so a slice of a chip is not taken for the whole; of
            several, the nearest is returned.
    """
    chips = [chip for chip in known_chips() if chip.backend == backend and name in chip.names]
    if memory_bytes is None:
        return chips[0] if len(chips) == 1 else None
    apart = [(_memory_apart(chip, memory_bytes), position) for position, chip in enumerate(chips)]
    distance, nearest = min(apart, default=(1.0, 0))
    return chips[nearest] if distance <= MEMORY_TOLERANCE else None


def _memory_apart(chip: KnownChip, memory_bytes: int) -> float:
    """Return by what part of the chip's size `memory_bytes` differs; a chip of any size fits."""
    if chip.memory_bytes is None:
        return MEMORY_TOLERANCE
    return abs(memory_bytes / chip.memory_bytes.value - 1)


def parse(text: str) -> tuple[KnownChip, ...]:
    """Return the chips of a catalogue in TOML.

    Raises:
        ValueError: when a key is unknown or missing, or a value is not what its key wants.
    """
    document = tomllib.loads(text)
    _check_keys(document, {"sources", "chip"}, {"sources", "chip"}, "the catalogue")
    for key, source in document["sources"].items():
        _check_keys(source, SOURCE_KEYS, SOURCE_KEYS, f"source {key!r}")
    return tuple(_chip(entry, document["sources"]) for entry in document["chip"])


def _chip(entry: dict[str, Any], sources: dict[str, Any]) -> KnownChip:
    where = f"chip {entry.get('name', '?')!r}"
    _check_keys(entry, CHIP_KEYS, REQUIRED, where)
    scaled = {
        attribute: _figure(entry[key], scale, sources, f"{where}, {key}") if key in entry else None
        for key, (attribute, scale) in SCALED.items()
    }
    tables = {key: _table(entry.get(key), sources, f"{where}, {key}") for key in TABLES}
    return KnownChip(
        backend=entry["backend"],
        name=entry["name"],
        names=tuple(entry["names"]),
        arch=entry["arch"],
        memory_bytes=scaled["memory_bytes"],
        bandwidth_bytes_per_second=scaled["bandwidth_bytes_per_second"],
        peak_tflops=tables["peak_tflops"],
        dtypes=tuple(entry["dtypes"]),
        link_bytes_per_second=scaled["link_bytes_per_second"],
        flop_per_cycle=tables["flop_per_cycle"],
        note=entry.get("note", ""),
    )


def _table(entry: dict[str, Any] | None, sources: dict[str, Any], where: str) -> dict[str, Figure]:
    """Return the figures of `{ source = "key", bfloat16 = 312, … }`, all from one source."""
    if entry is None:
        return {}
    _check_keys(entry, {"source", "bfloat16", "float16", "float32", "tf32"}, {"source"}, where)
    return {
        dtype: _figure([value, entry["source"]], 1, sources, f"{where}, {dtype}")
        for dtype, value in entry.items()
        if dtype != "source"
    }


def _figure(entry: object, scale: int, sources: dict[str, Any], where: str) -> Figure:
    """Return the figure of `[value, "source"]`."""
    if not isinstance(entry, list) or len(entry) != 2:
        raise ValueError(f'{where}: {entry!r} is not [number, "source"]')
    value, key = entry
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{where}: {value!r} is not a number")
    if key not in sources:
        raise ValueError(f"{where}: no source {key!r} (there are {', '.join(sources)})")
    return Figure(float(value * scale), sources[key]["title"], sources[key]["date"])


def _check_keys(entry: Mapping[str, Any], known: set[str], required: set[str], where: str) -> None:
    unknown, missing = sorted(set(entry) - known), sorted(required - set(entry))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(sorted(known))})")
    if missing:
        raise ValueError(f"{where}: key {missing[0]!r} is missing")
