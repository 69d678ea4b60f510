"""`mst devices`: what is here, with the source of every figure."""

from __future__ import annotations

import argparse

from mst.facts import DeviceFacts, MachineFacts
from mst.probe import machine_facts
from mst.registry import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mst devices`."""
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the facts of this machine; returns 0 even when no device is usable."""
    registry = load()
    facts = machine_facts(registry)
    if args.json:
        from mst.serial import dumps

        print(dumps(facts), end="")
    else:
        _print_table(facts)
        for record in registry.records:
            if record.status != "ok":
                print(f"plugin {record.name}: {record.status}; `mst plugins` says why")
    return 0


def _print_table(facts: MachineFacts) -> None:
    from rich.console import Console
    from rich.table import Table

    # Vendors' texts may hold brackets, which rich would take for its markup.
    console = Console(markup=False, highlight=False, emoji=False)
    columns = ("device", "name", "GiB free", "GiB total", "cores", "dtypes", "features")
    table = Table(*columns, box=None)
    for report in facts.backends:
        for device in report.probe.devices:
            table.add_row(
                f"{device.backend}:{device.index}",
                device.name if report.probe.usable else f"{device.name} (not usable)",
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
            console.print(f"{report.name}: {found}: {report.probe.reason}", soft_wrap=True)


def _sources(device: DeviceFacts) -> list[str]:
    """Return one line a figure: where it came from."""
    name = f"{device.backend}:{device.index}"
    return [f"{name} {figure}: {source}" for figure, source in device.sources.items()]


def _gib(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**30:.1f}"
