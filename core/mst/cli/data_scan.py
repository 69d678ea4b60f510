"""`mst data scan`: personal data in data files by kind and row, and a masked copy."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.errors import EXIT_FAILED, DataError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mst.seal.personal_data.scan import FileScan, Scan

_WORDS = {
    "id_card": "Chinese identity numbers", "uscc": "unified social credit codes",
    "passport": "passport lines", "iban": "IBANs", "bank_card": "bank cards",
    "us_ssn": "US social security numbers", "phone": "phone numbers", "email": "e-mail addresses",
    "ip": "public IPv4 addresses", "name": "names in fields",
}  # fmt: skip
_ROWS_SHOWN = 10


def add_arguments(actions: Any) -> None:
    """Add the action and its options."""
    scan = actions.add_parser(
        "scan", help="count personal data by kind and row, and mask it", allow_abbrev=False
    )
    scan.add_argument("paths", nargs="+", metavar="PATH", help="as --dataset takes them")
    scan.add_argument("--mask", metavar="OUT", help="write a masked copy of the one file to OUT")
    scan.add_argument("--json", action="store_true", help="JSON on standard output")


def run(args: argparse.Namespace) -> int:
    """Search, print, and return 1 when rows could not be searched; what is found is no failure."""
    from rich.console import Console

    from mst import serial
    from mst.seal.personal_data.mask import check_target, mask_file
    from mst.seal.personal_data.scan import scan_files

    files = _files(args.paths)
    target = None if args.mask is None else Path(args.mask).expanduser().absolute()
    if target is not None:
        if len(files) != 1:
            raise UsageError(
                f"mst data scan --mask writes a copy of one file; found {len(files)}. Call it once"
                " for each."
            )
        check_target(files[0], target)
    said = Console(stderr=True, highlight=False, markup=False)
    with said.status("searching") as status:
        found = scan_files(files, lambda path, row: status.update(f"{path.name}: row {row}"))
    if args.json:
        json.dump(serial.to_json(found), sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        _show(Console(highlight=False, markup=False, emoji=False), found)
    if target is not None:
        mask_file(files[0], target, found.files[0])
        said.print(f"masked copy: {target} (searched again: nothing found)", soft_wrap=True)
    return EXIT_FAILED if any(each.unread for each in found.files) else 0


def _files(specs: list[str]) -> list[Path]:
    from mst.data.sources import find_source

    files: list[Path] = []
    for spec in specs:
        source = find_source(spec, option="PATH")
        if source.selection.rows is not None:
            raise DataError(f"{spec}: a file is searched as a whole. Leave out what follows '#'.")
        files += source.files
    return list(dict.fromkeys(files))


def _show(console: Console, found: Scan) -> None:
    for file in found.files:
        _show_file(console, file)
    total = sum(file.rows for file in found.files)
    if found.rows:
        console.print(f"{found.rows} of {total} rows hold what looks like personal data.")
    else:
        console.print(
            f"No personal data of the kinds that are looked for in {total} rows. Names in running"
            " text and addresses are not looked for."
        )


def _show_file(console: Console, file: FileScan) -> None:
    console.print(f"{file.path}: {file.rows} rows", soft_wrap=True)
    for each in file.found:
        rows = ", ".join(map(str, each.rows[:_ROWS_SHOWN]))
        more = f" and {len(each.rows) - _ROWS_SHOWN} more" if len(each.rows) > _ROWS_SHOWN else ""
        console.print(f"  {_WORDS[each.kind]}: {each.values} (row {rows}{more})", soft_wrap=True)
    for reason in file.unread:
        console.print(f"  not searched: {reason}", soft_wrap=True)
