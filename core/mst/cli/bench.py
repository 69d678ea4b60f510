"""`mst bench`: what this machine or a cluster does with your models, in one table."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import EXIT_FAILED, Interrupted, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mst.bench.figures import Prices
    from mst.bench.matrix import Matrix
    from mst.bench.results import Results

ACTIONS = ("quick", "show", "merge", "peak", "peer", "resources")
# Options that go with some actions alone; "run" stands for a matrix and quick.
_GOES_WITH = {
    "output_dir": ("run", "peer"), "peer": ("run", "peer"), "peer_python": ("run", "peer"),
    "device": ("run", "peak"), "retry": ("run",), "keep_runs": ("run",),
    "predict": ("run",), "ray": ("run",), "output": ("merge",), "hosts": ("merge",),
    "dtype": ("peak",), "threads": ("peak",),
    "html": ("run", "show", "merge"), "csv": ("run", "show", "merge"),
    "compare": ("run", "show", "merge"), "tolerance": ("run", "show", "merge"),
    "price": ("run", "show", "merge"), "kwh_price": ("run", "show", "merge"),
    "currency": ("run", "show", "merge"),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the matrix or action, and the options of all."""
    parser.epilog = (
        "mst bench MATRIX.yaml measures what the file asks for (docs/bench.md); quick measures this"
        " machine in minutes; show FILE prints results; merge FILES makes one of several machines'"
        " results; peak measures a device's matrix product; peer CELL trains one cell in a peer,"
        " which the others begin by themselves; resources prints what a node tells Ray."
    )
    parser.add_argument("action", metavar="MATRIX|quick|show|merge|peak|peer|resources")
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="results, for show and merge; a cell"
    )
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--output-dir", metavar="DIR",
        help="takes the results; given again, it goes on from there (bench/<date>-<name>)",
    )  # fmt: skip
    measuring.add_argument("--device", metavar="NAME", help="of quick and peak, as of mst train")
    measuring.add_argument(
        "--retry", action="store_true", help="measure cells again that failed, hung or were lost"
    )
    measuring.add_argument("--keep-runs", action="store_true", help="keep each run's directory")
    measuring.add_argument(
        "--predict", nargs="+", action="extend", metavar="HARDWARE",
        help="forecast the cells for hardware that is not here, as mst plan --on takes it",
    )  # fmt: skip
    measuring.add_argument(
        "--ray", metavar="auto|ADDRESS", help="spread the cells over a Ray cluster"
    )
    measuring.add_argument(
        "--peer", nargs="+", action="extend", metavar="NAME",
        help="train each cell in another trainer too: trl, llamafactory, ms-swift, unsloth",
    )  # fmt: skip
    measuring.add_argument(
        "--peer-python", nargs="+", action="extend", metavar="NAME=PYTHON",
        help="the interpreter of a peer's environment (this one)",
    )  # fmt: skip
    measuring.add_argument("--dtype", metavar="NAME", help="of peak (bfloat16)")
    measuring.add_argument("--threads", type=int, metavar="N", help="of peak, on a CPU (its cores)")
    report = parser.add_argument_group("report")
    report.add_argument("--html", metavar="FILE", help="write a page too")
    report.add_argument("--csv", metavar="FILE", help="write a line a cell too")
    report.add_argument("--output", metavar="FILE", help="of merge: where the results go")
    report.add_argument(
        "--hosts", metavar="FILE", help="of merge: lines of NAME FILE, in place of the files"
    )
    report.add_argument(
        "--compare", metavar="OLD", help="older results; exit code 1 where figures got worse"
    )
    report.add_argument(
        "--tolerance", type=float, metavar="SHARE", help="of speed, lost without being told (0.03)"
    )
    report.add_argument(
        "--price", nargs="+", action="extend", metavar="CHIP=AMOUNT",
        help="of an hour of a device, by a part of its chip's name or by its backend",
    )  # fmt: skip
    report.add_argument("--kwh-price", type=float, metavar="AMOUNT", help="of a kWh")
    report.add_argument("--currency", metavar="NAME", help="as it is shown")
    report.add_argument("--json", action="store_true", help="the results on standard output")


def run(args: argparse.Namespace) -> int:
    """Do what was asked."""
    action = args.action if args.action in ACTIONS else "run"
    _check(args, "run" if action == "quick" else action)
    if action == "peak":
        return _peak(args)
    if action == "resources":
        return _resources()
    if action == "peer":
        return _peer(args)
    prices = _prices(args)
    if action == "show":
        return _show(args, prices)
    if action == "merge":
        return _merge(args, prices)
    return _bench(args, prices)


def _check(args: argparse.Namespace, action: str) -> None:
    """Raise UsageError for what doesn't go together."""
    for name, actions in _GOES_WITH.items():
        if getattr(args, name) not in (None, False) and action not in actions:
            shown = ", ".join("a matrix or quick" if each == "run" else each for each in actions)
            raise UsageError(
                f"mst bench {args.action}: --{name.replace('_', '-')} goes with {shown}. Leave it"
                " out."
            )
    if args.allow_net:
        raise UsageError("mst bench: --allow-net is for jobs on several machines. Leave it out.")
    least = 0 if args.hosts else 2
    wanted = {"show": (1, 1), "peer": (1, 1), "merge": (least, None)}.get(action, (0, 0))
    count = len(args.files)
    if count < wanted[0] or (wanted[1] is not None and count > wanted[1]):
        if action in ("run", "peak", "resources"):
            raise UsageError(
                f"mst bench {args.action}: unexpected argument {args.files[0]!r}. There is one"
                f" matrix, or one of {', '.join(ACTIONS)}."
            )
        words = {"show": "one file of results", "peer": "one file of a cell"}.get(
            action, "two files of results or more"
        )
        raise UsageError(f"mst bench {action} takes {words}; found {count}.")
    if args.tolerance is not None and not 0 <= args.tolerance < 1:
        raise UsageError(f"--tolerance takes a share from 0 to 1, not {args.tolerance}.")
    if args.device and action == "run" and args.action != "quick":
        raise UsageError("mst bench: --device goes with quick; a matrix has the key devices.")


def _prices(args: argparse.Namespace) -> Prices:
    from mst.bench.figures import Prices

    hour = {}
    for each in args.price or ():
        name, equals, amount = each.rpartition("=")
        if not equals or not name:
            raise UsageError(f"--price takes CHIP=AMOUNT, such as a100=2.5; found {each!r}.")
        hour[name] = _amount(amount, f"--price {name}")
    kwh = args.kwh_price
    return Prices(
        hour, None if kwh is None else _amount(str(kwh), "--kwh-price"), args.currency or ""
    )


def _amount(text: str, shown: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"{shown} takes an amount from 0 on, not {text!r}.")
    return value


def _peak(args: argparse.Namespace) -> int:
    from mst.bench.peak import measure_peak

    dtype = args.dtype or "bfloat16"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UsageError(f"--dtype {dtype}: a peak is of bfloat16, float16 or float32.")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads must be at least 1; found {args.threads}.")
    return measure_peak(args.device or "auto", dtype, args.threads, os.environ)


def _peers(args: argparse.Namespace) -> dict[str, str]:
    """Return the interpreter of each peer that was asked for."""
    from mst.bench.peers import peers_of

    return peers_of(args.peer or (), args.peer_python or (), sys.executable)


def _peer(args: argparse.Namespace) -> int:
    """Train one cell in its peer."""
    from mst.bench.peer_run import read_cell, run_peer

    cell = read_cell(Path(args.files[0]))
    peers = _peers(args)
    if cell.peer not in peers or not args.output_dir:
        raise UsageError(
            f"mst bench peer {args.files[0]} needs --peer {cell.peer or 'NAME'} and --output-dir."
        )
    return run_peer(cell, peers[cell.peer], Path(args.output_dir).absolute(), os.environ)


def _resources() -> int:
    """Print what this machine advertises to Ray, as `ray start --resources` takes it."""
    import json

    from mst.bench.ray_node import resources
    from mst.probe import machine_facts
    from mst.registry import load

    print(json.dumps(resources(machine_facts(load()))))
    return 0


def _show(args: argparse.Namespace, prices: Prices) -> int:
    from mst.bench.result_file import read_results

    return _report(args, read_results(Path(args.files[0])), prices)


def _merge(args: argparse.Namespace, prices: Prices) -> int:
    from mst.bench.hosts import present, read_hosts
    from mst.bench.result_file import merge, read_results, write_results
    from mst.rundir import now

    files: list[str] = list(args.files)
    notes: list[str] = []
    if args.hosts:
        there, notes = present(read_hosts(Path(args.hosts)))
        files += there
    if not files:
        raise UsageError(f"none of the files that --hosts {args.hosts} names is there.")
    results = merge([(each, read_results(Path(each))) for each in files], now())
    results = replace(results, notes=(*results.notes, *notes))
    if args.output:
        write_results(Path(args.output), results)
    return _report(args, results, prices)


def _bench(args: argparse.Namespace, prices: Prices) -> int:
    from rich.console import Console

    from mst.bench.cells import cells_of
    from mst.bench.job import Wish, bench
    from mst.bench.live import shown
    from mst.bench.matrix import QUICK_SECONDS
    from mst.bench.peers import check_matrix
    from mst.bench.result_file import read_results
    from mst.bench.results import BROKEN
    from mst.seal.audit import record

    peers = _peers(args)
    matrix = _matrix(args, bool(peers))
    check_matrix(matrix, peers)
    if args.compare:
        read_results(Path(args.compare))  # what can't be read is told of before hours of work
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    directory = Path(args.output_dir or Path("bench") / f"{stamp}-{matrix.name}").absolute()
    wish = Wish(
        matrix=matrix,
        directory=directory,
        environ=os.environ,
        seal=_seal(args),
        retry=args.retry,
        keep_runs=args.keep_runs,
        seconds=QUICK_SECONDS if args.action == "quick" else None,
        predict=tuple(args.predict or ()),
        ray=args.ray or "",
        peers=peers,
    )
    console = Console(highlight=False, markup=False, emoji=False, stderr=args.json)
    file = "quick" if args.action == "quick" else str(Path(args.action).absolute())
    record("bench.begun", matrix=file, cells=len(cells_of(matrix, peers)), directory=str(directory))
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with shown(console) as events:
            results = bench(wish, events)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; what was measured is in {directory}. Go on with: mst bench {args.action}"
            f" --output-dir {directory}"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    record("bench.ended", cells=len(results.cells), directory=str(directory))
    if not args.json:
        console.print(f"results {directory / 'results.json'}\n", soft_wrap=True)
    code = _report(args, results, prices)
    broken = any(each.status in BROKEN for each in results.cells)
    return code or (EXIT_FAILED if broken else 0)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _matrix(args: argparse.Namespace, peers: bool) -> Matrix:
    from mst.bench.matrix import QUICK, read_matrix

    if args.action != "quick":
        return read_matrix(Path(args.action))
    quick = replace(QUICK, devices=(args.device,)) if args.device else QUICK
    # Peers can't be compared on packed rows.
    return replace(quick, procedure=replace(quick.procedure, packing=not peers))


def _seal(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the options of the jail and the log that every command of the bench is given."""
    found = ["--jail", args.jail]
    if args.jail_reason:
        found += ["--jail-reason", args.jail_reason]
    if args.audit_log:
        found += ["--audit-log", str(Path(args.audit_log).absolute())]
    return tuple(found)


def _report(args: argparse.Namespace, results: Results, prices: Prices) -> int:
    """Print results, write what was asked for, compare; return the exit code."""
    import json

    from rich.console import Console

    from mst import serial
    from mst.bench.compare import TOLERANCE, compare
    from mst.bench.result_file import read_results
    from mst.bench.table import show_comparison, show_results

    console = Console(highlight=False, markup=False, emoji=False)
    if args.json:
        print(json.dumps(serial.to_json(results), indent=2, ensure_ascii=False))
    else:
        show_results(console, results, prices)
    _write_reports(args, console, results, prices)
    if not args.compare:
        return 0
    tolerance = TOLERANCE if args.tolerance is None else args.tolerance
    found = compare(read_results(Path(args.compare)), results, tolerance)
    if not args.json:
        show_comparison(console, found)
    return EXIT_FAILED if found.regressions else 0


def _write_reports(
    args: argparse.Namespace, console: Console, results: Results, prices: Prices
) -> None:
    from mst.bench.lines import csv_text
    from mst.bench.page import page
    from mst.durable import write_text

    for name, make in (("html", page), ("csv", csv_text)):
        target = getattr(args, name)
        if not target:
            continue
        try:
            write_text(Path(target), make(results, prices))
        except OSError as error:
            raise UsageError(f"--{name} {target} cannot be written: {error.strerror}.") from None
        if not args.json:
            console.print(f"wrote   {target}", soft_wrap=True)
