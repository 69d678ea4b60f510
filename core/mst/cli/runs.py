"""`mst runs`: list, show and compare runs; only reads them."""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.cli.language import add_language_option, language_asked
from mst.errors import UsageError
from mst.translation import translated

if TYPE_CHECKING:
    from rich.console import Console

    from mst.curve import Points

# Each has two marks in the drawing; past a few curves nobody can tell them apart.
_COMPARED_AT_MOST = 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="list|show|compare")
    listed = actions.add_parser("list", help="the runs in a directory", allow_abbrev=False)
    listed.add_argument("directory", nargs="?", default="runs", metavar="DIR", help="(./runs)")
    show = actions.add_parser("show", help="one run, with its curve", allow_abbrev=False)
    show.add_argument("runs", nargs=1, metavar="RUN", help="path, or name under ./runs")
    add_language_option(show)
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
        _show(console, paths[0], args.json, language_asked(args))
    else:
        if not 2 <= len(paths) <= _COMPARED_AT_MOST:
            raise UsageError(
                f"mst runs compare: takes 2 to {_COMPARED_AT_MOST} runs; found {len(paths)}."
            )
        _compare(console, paths, args.json)
    if args.png:
        from mst.curve import write_png

        names = [
            f"{letter} {path.name}" for letter, path in zip(_letters(paths), paths, strict=True)
        ]
        write_png(_curves(paths, names), Path(args.png))
        if not args.json:
            console.print(f"\nwrote {args.png}", soft_wrap=True)
    return 0


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def _list(console: Console, directory: Path, as_json: bool) -> None:
    from mst.runs import list_runs

    found = list_runs(directory)
    if as_json:
        _print_json([asdict(each) for each in found])
        return
    if not found:
        console.print(f"{directory} holds no runs. Start one: mst train")
        return
    rows = [
        ("run", "state", "model", "steps", "loss", "eval loss", "accuracy", "tokens/s", "created")
    ]
    rows += [
        (
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
        for each in found
    ]
    print_table(console, rows, left=3)
    for each in found:
        if each.state == "damaged":
            console.print(f"{each.name}: {each.problem}", soft_wrap=True)


def _letters(paths: Sequence[Path]) -> tuple[str, ...]:
    return tuple(string.ascii_lowercase[index] for index in range(len(paths)))


def _curves(paths: Sequence[Path], names: Sequence[str], language: str = "en") -> dict[str, Points]:
    """Return the runs' losses by a name for the legend; empty curves are left out."""
    from mst.runs import curves

    found: dict[str, Points] = {}
    for name, path in zip(names, paths, strict=True):
        prefix = f"{name} " if len(paths) > 1 else ""
        labels = (f"{prefix}{translated(each, language)}" for each in ("loss", "held-out loss"))
        found |= dict(zip(labels, curves(path), strict=True))
    return {name: points for name, points in found.items() if points}


def _draw(console: Console, paths: Sequence[Path], language: str = "en") -> None:
    from mst.curve import draw

    width = max(20, min(console.width - 14, 96))
    drawn = draw(_curves(paths, _letters(paths), language), width=width)
    console.print(f"\n{drawn or translated('no step was taken yet', language)}", soft_wrap=True)


def _show(console: Console, path: Path, as_json: bool, language: str) -> None:
    from rich.cells import set_cell_size

    from mst import rundir, serial
    from mst.plan import Plan
    from mst.quantities import gib
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
    rows = plan.global_batch
    lines = {
        "run": f"{path} ({translated(state, language)})",
        "error": manifest.error and translated(manifest.error, language),
        "model": manifest.model,
        "created": f"{manifest.created}, mst {manifest.mst_version}",
        "data": "; ".join(
            f"{each.path}, {each.rows} {translated('rows', language)}" for each in manifest.data
        ),
        "plan": translated(
            f"{plan.tuner} on {', '.join(plan.torch_devices)}, {plan.compute_dtype},"
            f" {plan.threads} threads, {plan.total_steps} steps of {rows} rows,"
            f" learning rate {plan.learning_rate:g}, {gib(plan.memory.peak_bytes)} predicted",
            language,
        ),
    }
    for name, text in lines.items():
        if text:
            label = set_cell_size(translated(name, language), 8)
            console.print(f"{label}{text}", soft_wrap=True)
    if manifest.results:
        console.print()
        print_table(console, [(name, _shown(each)) for name, each in manifest.results.items()])
    _draw(console, [path], language)


def _compare(console: Console, paths: Sequence[Path], as_json: bool) -> None:
    from mst import rundir
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
    letters = _letters(paths)
    for letter, path in zip(letters, paths, strict=True):
        console.print(f"{letter}  {path} ({rundir.state_of(path)})", soft_wrap=True)
    for heading, figures in (("option", options), ("result", results)):
        console.print()
        rows = [(name, *map(_shown, values)) for name, values in figures.items()]
        if rows:
            print_table(console, [(heading, *letters), *rows])
        else:
            console.print(f"no {heading} differs")
    _draw(console, paths)


def print_table(console: Console, rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print one line a row, however wide, so that it can be searched: rich would fold cells."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            each.ljust(width) if index < left else each.rjust(width)
            for index, (each, width) in enumerate(zip(row, widths, strict=True))
        ]
        console.print("  ".join(cells).rstrip(), soft_wrap=True)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value == int(value) else f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
