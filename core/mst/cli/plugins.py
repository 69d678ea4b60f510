"""`mst plugins`: what was found, why any is not used, and the kit for targets and engines."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from mst.errors import EXIT_FAILED, UsageError
from mst.registry import PluginRecord, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mst plugins`."""
    parser.add_argument(
        "action",
        nargs="?",
        choices=("check",),
        help="try every promise of an export target or a serving engine",
    )
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="as after --format or --engine",
    )
    parser.add_argument(
        "--engine-dir", metavar="DIR", help="where the environment of the engine lies"
    )
    parser.add_argument(
        "--model", metavar="DIR", help="to start the engine on (a tiny one with random weights)"
    )
    parser.add_argument("--json", action="store_true", help="print the records as JSON")


def run(args: argparse.Namespace) -> int:
    """Print one record a plugin; returns 0 even when some failed, for the others work."""
    if args.action == "check":
        return _check(args)
    records = load().records
    if args.json:
        plain = {"plugins": [asdict(record) for record in records]}
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        _print_table(records)
    return 0


def _check(args: argparse.Namespace) -> int:
    """Run the kit's part for what has this name; 1 when a promise is broken."""
    from rich.console import Console

    from mst.conformance import export_target, serving_engine
    from mst.conformance.findings import FAIL

    if args.name is None:
        raise UsageError(
            "mst plugins check: name the export target or the serving engine, as after --format or"
            " --engine."
        )
    with tempfile.TemporaryDirectory(prefix="mst-conformance-") as directory:
        if args.name in load().engines:
            results = serving_engine.run_checks(
                args.name, Path(directory), args.engine_dir, args.model
            )
        else:
            results = export_target.run_checks(args.name, Path(directory))
    if args.json:
        print(json.dumps([asdict(each) for each in results], indent=2, ensure_ascii=False))
    else:
        console = Console(markup=False, highlight=False, emoji=False)
        width = max(len(each.id) for each in results)
        for each in results:
            line = f"{each.id:<{width}}  {each.status:<6}  {each.found}"
            line += f". To do: {each.advice}" if each.status == FAIL else ""
            console.print(line, soft_wrap=True)
        counts = Counter(each.status for each in results)
        console.print(
            f"\n{args.name}: {counts['pass']} passed, {counts['fail']} failed,"
            f" {counts['skip']} skipped"
        )
    return EXIT_FAILED if any(each.status == FAIL for each in results) else 0


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
