"""`mst plugins`: every plugin that was found, and why any is not used."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from mst.registry import PluginRecord, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mst plugins`."""
    parser.add_argument("--json", action="store_true", help="print the records as JSON")


def run(args: argparse.Namespace) -> int:
    """Print one record a plugin; returns 0 even when some failed, for the others work."""
    records = load().records
    if args.json:
        plain = {"plugins": [asdict(record) for record in records]}
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        _print_table(records)
    return 0


def _print_table(records: tuple[PluginRecord, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    # Vendors' texts may hold brackets, which rich would take for its markup.
    console = Console(markup=False, highlight=False, emoji=False)
    table = Table("plugin", "kind", "status", "package", "hooks", box=None)
    for record in records:
        table.add_row(
            record.name,
            ", ".join(record.kinds),
            record.status,
            f"{record.distribution or 'unknown'} {record.version}".rstrip(),
            ", ".join(hook.removeprefix("mst_") for hook in record.hooks),
        )
    console.print(table)
    for record in records:
        if record.reason:
            console.print(f"{record.name}: {record.status}: {record.reason}", soft_wrap=True)
