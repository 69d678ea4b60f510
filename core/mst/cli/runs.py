"""`mst runs`: list, show and compare runs; only reads them."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mst.curve import Points


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="list|show|compare")
    listed = actions.add_parser("list", help="the runs in a directory", allow_abbrev=False)
    listed.add_argument("directory", nargs="?", default="runs", metavar="DIR", help="(./runs)")
    show = actions.add_parser("show", help="one run, with its curve", allow_abbrev=False)
    show.add_argument("runs", nargs=1, metavar="RUN", help="path, or name under ./runs")
    compare = actions.add_parser("compare", help="how runs differ", allow_abbrev=False)
    compare.add_argument("runs", nargs="+", metavar="RUN", help="paths, or names under ./runs")
    for each in (show, compare):
        each.add_argument("--png", metavar="FILE", help="write the curves there too")
    for each in (listed, show, compare):
        each.add_argument("--json", action="store_true", help="JSON on standard output")


def run(args: argparse.Namespace) -> int:
    """Do what was asked; alone, `mst runs` lists ./runs."""
    from rich.console import Console

    from mst.runs import RUNS, find_run

    # Names and texts from files may hold brackets, which rich would take for its markup.
    console = Console(highlight=False, markup=False, emoji=False)
    if args.action in (None, "list"):
        asked = args.action is not None
        _list(console, Path(args.directory) if asked else RUNS, asked and args.json)
        return 0
    paths = [find_run(each) for each in args.runs]
    if args.action == "show":
        _show(console, paths[0], args.json)
    else:
        if len(paths) < 2:
            raise UsageError("mst runs compare: takes two runs or more; found one.")
        _compare(console, paths, args.json)
    if args.png:
        from mst.curve import write_png

        write_png(_curves(paths), Path(args.png))
        if not args.json:
            console.print(f"\nwrote {args.png}", soft_wrap=True)
    return 0


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def _list(console: Console, directory: Path, as_json: bool) -> None:
    from rich.table import Table

    from mst.runs import list_runs

    found = list_runs(directory)
    if as_json:
        _print_json([asdict(each) for each in found])
        return
    if not found:
        console.print(f"{directory} holds no runs. Start one: mst train")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("run", "state", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("steps", "loss", "eval loss", "accuracy", "tokens/s", "created"):
        table.add_column(heading, justify="right")
    for each in found:
        table.add_row(
            each.name,
            each.state,
            each.model or "-",
            _number(each.steps, "d"),
            _number(each.loss),
            _number(each.eval_loss),
            _number(each.accuracy, ".1%"),
            _number(each.tokens_per_second, ".0f"),
            (each.created or "-")[:16].replace("T", " "),
        )
    console.print(table)
    for each in found:
        if each.state == "damaged":
            console.print(f"{each.name}: {each.problem}", soft_wrap=True)


def _curves(paths: Sequence[Path]) -> dict[str, Points]:
    """Return the runs' losses by a name for the legend; empty curves are left out."""
    from mst.runs import curves

    several = len(paths) > 1
    found: dict[str, Points] = {}
    for path in paths:
        loss, eval_loss = curves(path)
        found[f"{path.name} loss" if several else "loss"] = loss
        found[f"{path.name} held-out" if several else "held-out loss"] = eval_loss
    return {name: points for name, points in found.items() if points}


def _draw(console: Console, paths: Sequence[Path]) -> None:
    from mst.curve import draw

    drawn = draw(_curves(paths), width=max(20, min(console.width - 14, 96)))
    console.print(f"\n{drawn}" if drawn else "\nno step was taken yet", soft_wrap=True)


def _show(console: Console, path: Path, as_json: bool) -> None:
    from mst import rundir, serial
    from mst.cli.planning import gib
    from mst.plan import Plan
    from mst.runs import curves

    manifest = rundir.read_manifest(path)
    plan = rundir.read_document(Plan, path, rundir.PLAN)
    state = rundir.state_of(path)
    if as_json:
        loss, eval_loss = curves(path)
        _print_json(
            {
                "path": str(path),
                "state": state,
                "manifest": serial.to_json(manifest),
                "plan": serial.to_json(plan),
                "loss": loss,
                "eval_loss": eval_loss,
            }
        )
        return
    rows = plan.per_device_train_batch_size * plan.gradient_accumulation_steps
    lines = {
        "run": f"{path} ({state})",
        "error": manifest.error,
        "model": manifest.model,
        "created": f"{manifest.created}, mst {manifest.mst_version}",
        "data": "; ".join(f"{each.path}, {each.rows} rows" for each in manifest.data),
        "plan": f"{plan.tuner} on {plan.torch_device}, {plan.compute_dtype},"
        f" {plan.threads} threads, {plan.total_steps} steps of {rows} rows, learning rate {plan.learning_rate:g},"
        f" {gib(plan.memory.peak_bytes)} predicted",
    }
    for name, text in lines.items():
        if text:
            console.print(f"{name:<8}{text}", soft_wrap=True)
    if manifest.results:
        console.print()
        _print_table(console, ("result", ""), {k: (v,) for k, v in manifest.results.items()})
    _draw(console, [path])


def _compare(console: Console, paths: Sequence[Path], as_json: bool) -> None:
    from mst.runs import curves, differing_options, results_side_by_side

    options, results = differing_options(paths), results_side_by_side(paths)
    if as_json:
        losses = [dict(zip(("loss", "eval_loss"), curves(each), strict=True)) for each in paths]
        _print_json(
            {
                "runs": [str(each) for each in paths],
                "options": options,
                "results": results,
                "curves": losses,
            }
        )
        return
    names = [os.path.basename(os.path.abspath(each)) for each in paths]
    if options:
        _print_table(console, ("option", *names), options)
    else:
        console.print("the runs were asked for with the same options")
    console.print()
    _print_table(console, ("result", *names), results)
    _draw(console, paths)


def _print_table(
    console: Console, headings: Sequence[str], rows: Mapping[str, Sequence[Any]]
) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for name, values in rows.items():
        table.add_row(name, *map(_shown, values))
    console.print(table)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value == int(value) else f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
