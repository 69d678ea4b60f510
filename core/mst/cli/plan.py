"""`mst plan`: what `mst train` would do here, and why. Nothing is trained or written."""

from __future__ import annotations

import argparse
import json
import os
import sys

from mst.cli.options import add_train_options, given_options, train_request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `mst train`, and --json."""
    add_train_options(parser)
    parser.add_argument("--json", action="store_true", help="the plan as JSON on standard output")


def run(args: argparse.Namespace) -> int:
    """Plan and print."""
    from rich.console import Console

    from mst import serial
    from mst.cli.planning import show_plan
    from mst.job import prepare_job, resumed_request, with_defaults

    request, given = train_request(args), given_options(args)
    if request.resume is None:
        request = with_defaults(request, given)
    else:
        _, request = resumed_request(request, given)
    said = Console(stderr=True, highlight=False)
    job = prepare_job(request, os.environ, lambda line: said.print(line + " …"))
    if args.json:
        plain = {
            "plan": serial.to_json(job.plan) | {"peak_bytes": job.plan.memory.peak_bytes},
            "model": {k: v for k, v in serial.to_json(job.model).items() if k != "linears"},
            "data": [serial.to_json(each) for each in job.manifest.data],
        }
        json.dump(plain, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        show_plan(Console(highlight=False), job)
    return 0
