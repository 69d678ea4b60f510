"""`mst devices`: what is here, or with --known what is known, with the source of every figure."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mst.cli.language import add_language_option, language_asked
from mst.facts import DeviceFacts, MachineFacts
from mst.probe import machine_facts
from mst.registry import load
from mst.translation import translated

if TYPE_CHECKING:
    from rich.console import Console

    from mst.catalogue import Figure, KnownChip

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mst devices`."""
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument(
        "--known",
        action="store_true",
        help="list the catalogue of known chips instead of this machine's devices",
    )
    add_language_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the facts of this machine, or the catalogue; returns 0 even when nothing is usable."""
    if args.known:
        _run_known(args.json)
        return 0
    registry = load()
    facts = machine_facts(registry)
    if args.json:
        from mst.serial import dumps

        print(dumps(facts), end="")
    else:
        language = language_asked(args)
        _print_table(facts, language)
        for record in registry.records:
            if record.status != "ok":
                told = f"plugin {record.name}: {record.status}; `mst plugins` says why"
                print(translated(told, language))
    return 0


def _console() -> Console:
    from rich.console import Console

    # Vendors' texts may hold brackets, which rich would take for its markup.
    return Console(markup=False, highlight=False, emoji=False)


def _print_table(facts: MachineFacts, language: str) -> None:
    from rich.table import Table

    console = _console()
    columns = ("device", "name", "GiB free", "GiB total", "cores", "dtypes", "features")
    table = Table(*(translated(each, language) for each in columns), box=None)
    for report in facts.backends:
        for device in report.probe.devices:
            table.add_row(
                f"{device.backend}:{device.index}",
                device.name
                if report.probe.usable
                else translated(f"{device.name} (not usable)", language),
                _gib(device.memory_free_bytes),
                _gib(device.memory_total_bytes),
                "?" if device.compute_units is None else str(device.compute_units),
                ", ".join(device.dtypes),
                ", ".join(device.features),
            )
    console.print(table)
    for report in facts.backends:
        for device in report.probe.devices:
            for line in _sources(device):
                console.print(line, soft_wrap=True)
    for report in facts.backends:
        if not report.probe.usable:
            found = "found, not usable" if report.probe.found else "not found"
            told = ": ".join(translated(each, language) for each in (found, report.probe.reason))
            console.print(f"{report.name}: {told}", soft_wrap=True)


def _sources(device: DeviceFacts) -> list[str]:
    """Return one line a figure: what the table has no room for, and where it came from."""
    name = f"{device.backend}:{device.index}"
    values = _values(device)
    lines = []
    for figure in [*device.sources, *(key for key in values if key not in device.sources)]:
        parts = [f"{name} {figure}", values.get(figure, ""), device.sources.get(figure, "")]
        lines.append(": ".join(part for part in parts if part))
    return lines


def _values(device: DeviceFacts) -> dict[str, str]:
    """Return the facts that have no column, by attribute name, as text; unknown ones are absent."""
    values = {
        "peak_tflops": ", ".join(f"{key} {one:g}" for key, one in device.peak_tflops.items()),
        "links": ", ".join(f"{kind} to {other}" for other, kind in device.links.items()),
    }
    if device.bandwidth_bytes_per_second is not None:
        bandwidth = f"{device.bandwidth_bytes_per_second / 1e9:g} GB/s"
        values["bandwidth_bytes_per_second"] = bandwidth
    return {key: value for key, value in values.items() if value}


def _run_known(as_json: bool) -> None:
    from mst.catalogue import known_chips

    if as_json:
        from mst.serial import to_json

        chips = [to_json(chip) for chip in known_chips()]
        print(json.dumps({"chips": chips}, indent=2, ensure_ascii=False))
    else:
        _print_known(known_chips())


def _print_known(chips: Sequence[KnownChip]) -> None:
    """Print a row a chip, then notes, then the sources that the rows number."""
    from rich.table import Table

    console = _console()
    numbers: dict[str, int] = {}
    notes: dict[str, list[str]] = {}
    # Eighty columns hold it just so: a name that is cut short would be useless.
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("backend", "chip", "GiB", "GB/s", *SHORT.values(), "dtypes", "sources"):
        table.add_column(column, no_wrap=True)
    for chip in chips:
        cited = {
            numbers.setdefault(f"{figure.source} ({figure.date})", len(numbers) + 1)
            for figure in _figures(chip)
        }
        table.add_row(*_cells(chip), " ".join(map(str, sorted(cited))))
        for note in _notes(chip):
            notes.setdefault(note, []).append(chip.name)
    console.print("Dense peaks in TFLOPS, with fp32 accumulation; ? is unknown.")
    console.print(table)
    console.print()
    for note, names in notes.items():
        console.print(f"{', '.join(names)}: {note}", soft_wrap=True)
    console.print("\nSources; `mst devices --known --json` has them beside each figure:")
    for source, number in numbers.items():
        console.print(f"{number:3} {source}", soft_wrap=True)


def _cells(chip: KnownChip) -> list[str]:
    """Return a chip's row, without its sources."""
    memory, bandwidth = chip.memory_bytes, chip.bandwidth_bytes_per_second
    return [
        chip.backend,
        chip.name,
        _gib(int(memory.value)) if memory else "?",
        f"{bandwidth.value / 1e9:.4g}" if bandwidth else "?",
        *(
            f"{chip.peak_tflops[key].value:.4g}" if key in chip.peak_tflops else "?"
            for key in SHORT
        ),
        " ".join(SHORT.get(dtype, dtype) for dtype in chip.dtypes),
    ]


def _figures(chip: KnownChip) -> list[Figure]:
    single = (chip.memory_bytes, chip.bandwidth_bytes_per_second, chip.link_bytes_per_second)
    tables = (chip.peak_tflops, chip.flop_per_cycle)
    return [one for one in single if one] + [one for table in tables for one in table.values()]


def _notes(chip: KnownChip) -> list[str]:
    """Return what the table has no column for."""
    notes = [
        f"{SHORT.get(dtype, dtype)} {figure.value:g} FLOP a core and cycle"
        for dtype, figure in chip.flop_per_cycle.items()
    ]
    if chip.link_bytes_per_second:
        notes.append(f"links to other chips {chip.link_bytes_per_second.value / 1e9:g} GB/s in all")
    return [*notes, chip.note] if chip.note else notes


def _gib(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**30:.1f}"
