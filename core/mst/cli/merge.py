"""`mst merge`: write a run's adapter into its base model, and prove that both say the same."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from mst.cli.keys import add_key_options, ring_given
from mst.seal.supply.before_use import add_signature_options, verify_before_use


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run and the options of the merge."""
    from mst.merge import DTYPES

    parser.add_argument("run", metavar="RUN", help="run directory, or its name under ./runs")
    parser.add_argument("--output-dir", metavar="DIR", help="new directory (RUN/merged)")
    parser.add_argument(
        "--checkpoint",
        metavar="last|best|STEP",
        help="merge this checkpoint instead of the finished result",
    )
    add_key_options(parser)
    add_signature_options(parser)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="dtype of the stored weights; the merge itself is float32 (auto: as the base has)",
    )


def run(args: argparse.Namespace) -> int:
    """Merge and say what was measured."""
    from rich.console import Console

    from mst.merge import merge, prepare_merge
    from mst.runs import find_run
    from mst.seal.audit import record
    from mst.seal.audit.facts import export_facts, model_facts

    console = Console(highlight=False, markup=False)
    output = None if args.output_dir is None else Path(args.output_dir)
    keys = ring_given(args)
    job = prepare_merge(find_run(args.run), output, args.checkpoint, args.dtype, keys)
    verify_before_use(Path(job.source.weights), args.model_signature, args.model_public_key)
    record("merge.begun", run=job.run, target=job.output_dir, **model_facts(job.source))
    with console.status("merging and comparing"):
        report = merge(job, os.environ, keys)
    record("merge.ended", **export_facts(Path(job.output_dir), report))
    shown = os.path.relpath(job.output_dir)
    console.print(f"merged  {shown}: step {report.step}, {report.dtype}", soft_wrap=True)
    for words, found in (
        ("both in float32", report.merged),
        (f"as stored, in {report.dtype}", report.stored),
    ):
        console.print(
            f"check   {words}: the same most likely token at {found.argmax_agreement:.2%} of"
            f" {found.positions} random tokens, largest difference {found.max_abs_difference:.2g}",
            soft_wrap=True,
        )
    if job.source.encrypted_run is not None:
        console.print("note    the merged model is not encrypted, as its run is")
    console.print(f"\nnext:\n  mst chat {shlex.quote(shown)}", soft_wrap=True)
    return 0
