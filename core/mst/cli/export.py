"""`mst export`: write a run for serving engines, and compare each result with what was trained."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from mst.cli.keys import add_key_options, ring_given
from mst.errors import UsageError
from mst.seal.supply.before_use import add_signature_options, verify_before_use

if TYPE_CHECKING:
    from rich.console import Console

    from mst.export.job import ExportJob, ExportOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run and the options of the export."""
    from mst.export.job import CALIBRATION_ROWS
    from mst.merge import DTYPES

    parser.add_argument("run", metavar="RUN", help="run directory, or its name under ./runs")
    parser.add_argument(
        "--format",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="merged (the default), gptq, awq, compressed-tensors, turbomind, or a plugin's;"
        " several share the merge",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="a directory a format (RUN/export)")
    parser.add_argument(
        "--checkpoint", metavar="last|best|STEP", help="export this instead of the finished result"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", *DTYPES), help="of weights that stay whole"
    )
    parser.add_argument(
        "--method", default="auto", metavar="NAME", help="how codes are found: auto, or rtn"
    )
    parser.add_argument("--bits", type=int, metavar="N", help="of a code (the format's usual)")
    parser.add_argument(
        "--group-size", default="auto", metavar="N", help="weights that share a scale (auto)"
    )
    parser.add_argument(
        "--calibration", nargs="+", default=[], metavar="PATH",
        help="rows to calibrate by, as --dataset takes them (the run's training rows)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-rows",
        type=int,
        default=CALIBRATION_ROWS,
        metavar="N",
        help=f"at most so many ({CALIBRATION_ROWS})",
    )
    parser.add_argument(
        "--option", nargs="+", default=[], metavar="NAME=VALUE", help="options of a plugin's own"
    )
    add_key_options(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check, say what would be done, and stop"
    )
    add_signature_options(parser)


def run(args: argparse.Namespace) -> int:
    """Export, compare, and say what was measured."""
    from rich.console import Console

    from mst.export.job import export, prepare_export, refuse_merged
    from mst.registry import load
    from mst.runs import find_run
    from mst.seal.audit import record
    from mst.seal.audit.facts import artefact_facts, model_facts

    console = Console(highlight=False, markup=False)
    keys = ring_given(args)
    refuse_merged(Path(args.run))
    job = prepare_export(find_run(args.run), _options(args), load(), keys)
    verify_before_use(Path(job.source.weights), args.model_signature, args.model_public_key)
    _show_plan(console, job)
    if args.dry_run:
        return 0
    names = [each.name for each in job.targets]
    record("export.begun", run=job.run, formats=names, **model_facts(job.source))
    code = export(job, os.environ, keys, lambda line: console.print(f"{line} …"))
    for each in job.targets:
        record("export.ended", **artefact_facts(Path(each.directory)))
        _show_result(console, Path(each.directory))
    return code


def _options(args: argparse.Namespace) -> ExportOptions:
    from mst.export.job import ExportOptions

    options = {}
    for each in args.option:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise UsageError(f"--option takes NAME=VALUE; found {each!r}.")
        options[name] = value
    group = args.group_size
    if group != "auto" and not (group.isdigit() and int(group)):
        raise UsageError(f"--group-size takes auto or a number, not {group!r}.")
    if args.calibration_rows < 1:
        raise UsageError(f"--calibration-rows {args.calibration_rows}: at least 1 is needed.")
    return ExportOptions(
        formats=tuple(args.format or ("merged",)),
        output_dir=args.output_dir,
        which=args.checkpoint,
        dtype=args.dtype,
        method=args.method,
        bits=args.bits,
        group_size=None if group == "auto" else int(group),
        calibration=tuple(args.calibration),
        calibration_rows=args.calibration_rows,
        options=options,
    )


def _show_plan(console: Console, job: ExportJob) -> None:
    from mst.quantities import gib

    for each in job.targets:
        plan = each.plan
        console.print(f"{each.name}: {plan.scheme}; {gib(plan.disk_bytes)} on disk", soft_wrap=True)
        for reason in plan.reasons:
            console.print(f"  {reason.choice} {reason.value}: {reason.why}", soft_wrap=True)
        for what, why in plan.not_checked.items():
            console.print(f"  not checked here: {what} ({why})", soft_wrap=True)


def _show_result(console: Console, directory: Path) -> None:
    from mst.export.job import PASSED
    from mst.training.sealed_directory import MANIFEST

    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    shown = shlex.quote(os.path.relpath(directory))
    console.print(f"\n{manifest['format']}  {manifest['status']}  {shown}", soft_wrap=True)
    for fault in manifest["faults"]:
        console.print(f"  {fault}", soft_wrap=True)
    if manifest["quality"] is not None:
        model = manifest["quality"]["model"]
        line = (
            f"  {model['tokens']} tokens {manifest['judged_from']}: perplexity"
            f" {model['perplexity']:.4g} ({model['perplexity_ratio']:.4f} times the trained"
            f" model's), divergence {model['mean_kl']:.4g} nats, same likeliest token"
            f" {model['agreement']:.2%}"
        )
        console.print(line, soft_wrap=True)
        line = (
            f"  {model['trained_tokens']} of them in answers: perplexity"
            f" {model['trained_ratio']:.4f} times, divergence {model['trained_kl']:.4g} nats"
        )
        console.print(line, soft_wrap=True)
        found = manifest["quality"]["answers"]
        if found is not None:
            right = f"{found['right']:.1%} of {found['asked']}, before {found['trained_right']:.1%}"
            console.print(f"  right answers {right}", soft_wrap=True)
    if manifest["status"] == PASSED:
        for command in manifest["serve"]:
            console.print(f"  {command.replace('{path}', shown)}", soft_wrap=True)
