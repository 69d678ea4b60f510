"""`mst plan`: what `mst train` would do here, and why. Nothing is trained or written."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mst.cli.options import LONGEST, add_train_options, given_options, train_request
from mst.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mst.job import Job
    from mst.memory_trace import TraceEstimate
    from mst.request import TrainRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `mst train`, and what to plan for and to print."""
    add_train_options(parser)
    parser.epilog = (
        f"--max-length {LONGEST} plans no run: it finds the longest rows that fit, in each way to"
        " train."
    )
    parser.add_argument(
        "--on",
        metavar="HARDWARE",
        help="plan for hardware that is not here: a100-80gb:4, rtx-3090:2+cpu-32c-128gb,"
        " cpu-16c-64gb (`mst devices --known` lists the chips)",
    )
    parser.add_argument(
        "--compare", action="store_true", help="all plans that were looked at, as a table"
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="a second estimate of the memory: a step of the model is run on tensors without data",
    )
    parser.add_argument(
        "--report",
        nargs="?",
        const="runs",
        metavar="DIR",
        help="how good the forecasts of the runs in a directory were (runs)",
    )
    parser.add_argument("--json", action="store_true", help="the plan as JSON on standard output")


def run(args: argparse.Namespace) -> int:
    """Plan and print."""
    from rich.console import Console

    from mst import serial
    from mst.cli.planning import show_alternatives, show_plan, show_trace
    from mst.inputs import with_defaults
    from mst.job import prepare_job
    from mst.resume import resumed_request
    from mst.seal.audit import record
    from mst.seal.audit.facts import job_facts
    from mst.shortfall import NothingFits

    if args.report is not None:
        return _report(Path(args.report), args.json)
    longest = asks_for_longest(args)
    request, given = train_request(args), given_options(args)
    if request.resume is None:
        request = with_defaults(request, given)
    else:
        _, request = resumed_request(request, given)
    said = Console(stderr=True, highlight=False)

    def tell(line: str) -> None:
        said.print(line + " …", soft_wrap=True)

    if longest:
        return _longest(request, args, tell)
    try:
        job = prepare_job(request, os.environ, tell, args.on)
    except NothingFits as error:
        if args.compare and not args.json:
            show_alternatives(Console(highlight=False), error.alternatives)
        raise
    record("plan.made", **job_facts(job))
    traced = _trace(job) if args.trace else None
    if args.json:
        plain: dict[str, object] = {
            "plan": serial.to_json(job.plan) | {"peak_bytes": job.plan.memory.peak_bytes},
            "model": {k: v for k, v in serial.to_json(job.model).items() if k != "linears"},
            "data": [serial.to_json(each) for each in job.manifest.data],
        }
        if traced is not None:
            plain["trace"] = serial.to_json(traced) | {"peak_bytes": traced.peak_bytes}
        json.dump(plain, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        console = Console(highlight=False)
        show_plan(console, job)
        if traced is not None:
            show_trace(console, job.plan.memory, traced)
        if args.compare:
            show_alternatives(console, job.plan.alternatives, job.plan)
    return 0


def asks_for_longest(args: argparse.Namespace) -> bool:
    """Return whether `--max-length max` was given, and take it out of the options.

    Raises:
        UsageError: with options that show a plan.
    """
    if args.max_length != LONGEST:
        return False
    args.max_length = None
    for name in ("compare", "trace"):
        if getattr(args, name):
            raise UsageError(
                f"--{name} was given with --max-length {LONGEST}, which makes no plan and lists all"
                f" ways to train. Leave --{name} out, or pass a length."
            )
    return True


def _longest(request: TrainRequest, args: argparse.Namespace, tell: Callable[[str], None]) -> int:
    """Print how long rows may be."""
    from rich.console import Console

    from mst import serial
    from mst.cli.planning import show_longest
    from mst.inputs import gather
    from mst.longest import longest_rows
    from mst.seal.audit import record
    from mst.seal.audit.facts import manifest_facts
    from mst.space import open_space

    inputs = gather(request, os.environ, tell, args.on)
    tell("finding the longest rows")
    where = inputs.where
    found = longest_rows(
        open_space(
            where.devices,
            where.capabilities,
            inputs.model,
            inputs.data,
            request,
            where.host_bytes,
            inputs.zero,
        )
    )
    lengths = [each.max_length for each in found.limits]
    record("plan.lengths", longest=lengths[0], **manifest_facts(inputs.manifest))
    if args.json:
        plain = {
            "longest": serial.to_json(found),
            "model": {k: v for k, v in serial.to_json(inputs.model).items() if k != "linears"},
            "data": [serial.to_json(each) for each in inputs.manifest.data],
        }
        json.dump(plain, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        show_longest(Console(highlight=False), inputs, found)
    return 0


def _trace(job: Job) -> TraceEstimate:
    """Return the second estimate of the plan's memory.

    Raises:
        PlanError: this plan can't be traced.
        ModelError: the model's step doesn't run without data.
    """
    from mst.candidates import attention_kernel
    from mst.memory_trace import trace
    from mst.retry import configuration_of
    from mst.sharing_choice import counted_on
    from mst.training.batches import layout_of
    from mst.workload import largest_step

    plan = job.plan
    step = largest_step(
        job.data,
        plan.per_device_train_batch_size,
        plan.global_batch,
        job.request.seed,
        plan.total_steps,
        layout_of(True, plan.attention),
        plan.prefix_sharing and counted_on(job.model, job.data, job.request, plan.attention),
    )
    return trace(
        Path(job.manifest.model_path),
        configuration_of(plan, job.request),
        step,
        os.environ,
        on_host=plan.torch_devices[0] == "cpu",
        attention_kernel=attention_kernel(plan.torch_devices[0].partition(":")[0]),
    )


def _report(directory: Path, as_json: bool) -> int:
    """Print what was forecast and what was measured, over the runs in a directory."""
    from dataclasses import asdict

    from rich.console import Console

    from mst.cli.planning import show_track_record
    from mst.track_record import entries, summary

    if not directory.is_dir():
        raise UsageError(
            f"mst plan --report {directory}: no such directory. Give the one that holds the runs;"
            " `mst train` writes them into ./runs unless --output-dir says otherwise."
        )
    found = entries(directory)
    if as_json:
        plain = {"runs": [asdict(each) for each in found], "summary": asdict(summary(found))}
        json.dump(plain, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        show_track_record(Console(highlight=False), directory, found)
    return 0
