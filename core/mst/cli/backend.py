"""`mst backend`: begin a backend, and check one against every promise of the hookspec."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import EXIT_FAILED, UsageError

if TYPE_CHECKING:
    from mst.conformance.findings import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions, each with its options; `run` calls the one that was asked for."""
    actions = parser.add_subparsers(dest="action", metavar="new|check|verify")
    _add_new(actions.add_parser("new", help="write a package to begin with", allow_abbrev=False))
    _add_check(actions.add_parser("check", help="run the conformance kit", allow_abbrev=False))
    _add_verify(actions.add_parser("verify", help="see if a report is whole", allow_abbrev=False))


def run(args: argparse.Namespace) -> int:
    """Do what was asked."""
    if args.action is None:
        raise UsageError("mst backend: say what to do: new, check or verify. `mst backend --help`.")
    action: Callable[[argparse.Namespace], int] = args.act
    return action(args)


def _add_new(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the backend's, as after --device")
    parser.add_argument(
        "--output-dir", metavar="DIR", help="where the package is written (./mst-NAME)"
    )
    parser.set_defaults(act=_new)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the backend, as after --device")
    parser.add_argument(
        "--output", metavar="FILE", help="the report (./mst-conformance-NAME-DATE.json)"
    )
    parser.add_argument("--only", metavar="ID,…", default="", help="only these checks or subjects")
    parser.add_argument(
        "--time-limit", metavar="SECONDS", type=float, help="no check may take longer"
    )
    parser.add_argument("--json", action="store_true", help="print the report, not a table")
    parser.set_defaults(act=_check)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", metavar="REPORT", help="a file that `check` wrote")
    parser.set_defaults(act=_verify)


def _new(args: argparse.Namespace) -> int:
    """Write a vendor's package, and say what to type next."""
    from mst.registry import load
    from mst.scaffold import names_of, write_package

    registry = load()
    taken = {record.name: record.distribution for record in registry.records}
    taken |= dict.fromkeys(set(registry.backends) - set(taken), "")
    names = names_of(args.name, taken)
    target = Path(args.output_dir or names.distribution)
    paths = write_package(names, target)
    print(f"wrote {target}: {', '.join(paths)}\n\nNext, and then whatever the last one names:")
    # Without dependencies: mst is here, and may not have come from a package index.
    print(f"  python -m pip install --no-deps -e {shlex.quote(os.path.join('.', str(target)))}")
    print(f"  mst devices\n  mst backend check {names.name}")
    return 0


def _check(args: argparse.Namespace) -> int:
    """Run the kit, print a line a check and write the report; 1 when any check failed."""
    from mst.conformance.checks import chosen
    from mst.conformance.findings import PASS
    from mst.conformance.report import default_path, make_report, write_report
    from mst.conformance.runner import find_subject, run_checks

    checks = chosen([each.strip() for each in args.only.split(",") if each.strip()])
    if args.time_limit is not None and args.time_limit <= 0:
        raise UsageError(f"--time-limit takes seconds above 0; found {args.time_limit:g}.")
    path = Path(args.output) if args.output else default_path(args.name)
    if not os.access(path.parent, os.W_OK):
        raise UsageError(
            f"--output {path}: {path.parent.absolute()} cannot be written. Name another."
        )
    width = max(len(check.id) for check in checks)
    results = []
    with tempfile.TemporaryDirectory(prefix="mst-conformance-") as directory:
        subject = find_subject(args.name, Path(directory))
        if not args.json:
            _print(f"{'check':<{width}}  status  found; what to do")
        for result in run_checks(checks, subject, Path(directory), args.time_limit):
            results.append(result)
            if not args.json:
                _print_result(result, width)
    report = make_report(subject, results)
    write_report(report, path)
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print_sum(args.name, results, bool(report["complete"]), path)
    return 0 if report["verdict"] == PASS else EXIT_FAILED


def _print(text: str, style: str = "") -> None:
    from rich.console import Console
    from rich.text import Text

    # A vendor's texts may hold brackets, which rich would take for its markup.
    console = Console(markup=False, highlight=False, emoji=False)
    console.print(Text(text, style=style), soft_wrap=True)


def _print_result(result: Result, width: int) -> None:
    styles = {"pass": "", "fail": "bold red", "skip": "yellow"}
    line = f"{result.id:<{width}}  {result.status:<6}  {result.found}"
    if result.advice:
        line += f". To do: {result.advice}"
    _print(line, styles[result.status])


def _print_sum(name: str, results: Sequence[Result], complete: bool, path: Path) -> None:
    counts = Counter(result.status for result in results)
    whole = "" if complete else " of some of the checks, which signs nothing off"
    _print(
        f"\n{name}: {counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped"
        f" in {sum(result.seconds for result in results):.0f} s"
    )
    _print(f"wrote {path}: the report{whole}")


def _verify(args: argparse.Namespace) -> int:
    """Say whether a report is as the kit wrote it; 1 when it was changed."""
    from mst.conformance.report import read_report, report_is_whole

    path = Path(args.report)
    report = read_report(path)
    if not report_is_whole(path):
        print(
            f"{path} was changed after it was written: its sha256 does not fit. Run the kit anew."
        )
        return EXIT_FAILED
    complete = "every check" if report["complete"] else "some checks only"
    print(
        f"{path} is whole: {report['backend']}, {complete}, {report['verdict']}, {report['date']}"
    )
    return 0
