"""`mst bug-report`: an archive with what a maintainer needs, and nothing of anybody's data."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import datetime
from pathlib import Path

from mst.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mst bug-report`."""
    parser.add_argument(
        "--run", metavar="RUN", help="whose plan and figures go with it (the newest in ./runs)"
    )
    parser.add_argument("--no-run", action="store_true", help="leave every run out")
    parser.add_argument(
        "--output", "--out", metavar="FILE", help="the archive (mst-bug-report-TIME.zip)"
    )
    parser.add_argument("--show", action="store_true", help="print what it would hold, and end")


def run(args: argparse.Namespace) -> int:
    """Say what the report holds, then write it."""
    from mst.bug_report.archive import write
    from mst.bug_report.contents import contents

    if args.run is not None and args.no_run:
        raise UsageError("mst bug-report: pass --run or --no-run, not both.")
    found = contents(os.environ, None if args.no_run else _run(args.run))
    if args.show:
        for name, data in found.items():
            print(f"== {name}\n{data.decode()}")
        return 0
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    target = Path(args.output or f"mst-bug-report-{stamp}.zip").expanduser()
    print("The report holds, without names, paths, rows, prompts and keys:")
    width = max(map(len, found))
    for name, data in found.items():
        print(f"  {name:<{width}}  {len(data):>7} bytes")
    sys.stdout.flush()
    write(found, target)
    print(f"written  {target}, readable by you alone. Look through it before you send it.")
    return 0


def _run(asked: str | None) -> Path | None:
    """Return the run that was asked for, or the newest in ./runs."""
    from mst.runs import RUNS, find_run, list_runs

    if asked is not None:
        return find_run(asked)
    found = list_runs(RUNS) if RUNS.is_dir() else ()
    runs = [each for each in found if each.state != "not a run"]
    return Path(runs[-1].path) if runs else None
