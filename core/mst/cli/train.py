"""`mst train`: plan, train, measure, and say what to do next."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst.cli.keys import options_again
from mst.cli.options import add_train_options, given_options, train_request
from mst.errors import EXIT_FAILED

if TYPE_CHECKING:
    from rich.console import Console

    from mst.request import TrainRequest
    from mst.rundir import RunManifest
    from mst.seats import Seats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take every option of a training request."""
    add_train_options(parser)


def run(args: argparse.Namespace) -> int:
    """Train, or continue a run; alone, or as one of several commands that share a job."""
    from mst.placement import placement

    request = train_request(args)
    place = placement(os.environ, request)
    if place is None:
        return _run(args, request, None)
    from mst.seats import dismiss, meet
    from mst.shared_job import placed_request, work_along

    with meet(place, os.environ) as seats:
        if place.seat:
            return work_along(seats, os.environ, lambda line: print(line + " …", flush=True))
        code = EXIT_FAILED
        try:
            code = _run(args, placed_request(request, place), seats)
        finally:
            dismiss(seats, code)
        return code


def _run(args: argparse.Namespace, request: TrainRequest, seats: Seats | None) -> int:
    from rich.console import Console

    from mst import rundir
    from mst.attempts import run_to_end
    from mst.cli.planning import show_plan
    from mst.inputs import with_defaults
    from mst.job import begin, prepare_job
    from mst.resume import resume

    console = Console(highlight=False)
    given = given_options(args)
    if seats is not None:  # the starter has said so
        given |= {"nnodes", "nproc_per_node"} if request.nproc_per_node else {"nnodes"}

    def tell(line: str) -> None:
        console.print(line + " …", soft_wrap=True)

    if request.resume is not None:
        path, lock, job = resume(request, given, os.environ, tell)
    else:
        if not request.dataset:
            tell("no --dataset: taking the embedded rows, 12 intents of banking77")
        job = prepare_job(with_defaults(request, given), os.environ, tell)
        path, lock = begin(job)
    job = replace(job, seats=seats)
    show_plan(console, job)
    console.print(f"run     {path}\n", soft_wrap=True)
    with lock:
        code = run_to_end(path, job, lock, os.environ, tell)
    if code == 0:
        show_outcome(console, path, rundir.read_manifest(path), job.request)
    return code


def show_outcome(
    console: Console, path: Path, manifest: RunManifest, request: TrainRequest
) -> None:
    """Print what was measured, and the commands to type next."""
    from rich.table import Table

    from mst.quantities import gib
    from mst.seal.keys.run_key import first_way

    results = manifest.results
    if "accuracy_after_restricted" in results:
        table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
        rows = f"accuracy on {results['accuracy_rows']:.0f} held-out rows"
        for heading in (rows, "before", "after"):
            table.add_column(heading, justify="left" if heading == rows else "right")
        for kind, words in (("restricted", "best of the answers"), ("free", "free generation")):
            before = results.get(f"accuracy_before_{kind}")
            shown = "-" if before is None else f"{before:.1%}"
            table.add_row(words, shown, f"{results[f'accuracy_after_{kind}']:.1%}")
        baseline = results.get("accuracy_baseline")
        shown = "scikit-learn is not installed" if baseline is None else f"{baseline:.1%}"
        table.add_row("TF-IDF + logistic regression, same rows", "", shown)
        console.print()
        console.print(table)
    if "eval_rewards/margins" in results:
        accuracy = results.get("eval_rewards/accuracies")
        right = "" if accuracy is None else f", the better answer preferred in {accuracy:.1%}"
        console.print(f"\nheld out: margin {results['eval_rewards/margins']:.3f}{right}")
    if "best_eval_reward" in results:
        best, step = results["best_eval_reward"], results["best_step"]
        console.print(
            f"\nheld out: mean reward {results['eval_reward']:.3f}; {best:.3f} at best, after step"
            f" {step:.0f}"
        )
    peak, predicted = results["peak_memory_bytes"], results["predicted_memory_bytes"]
    console.print(
        f"\nmemory  {gib(peak)} at the peak, {gib(predicted)} predicted"
        f" ({(predicted - peak) / peak:+.0%})"
    )
    console.print(
        f"speed   {results['tokens_per_second']:.0f} tokens/s, {results['steps']:.0f} steps in"
        f" {results['train_seconds']:.0f} s"
    )
    # What opens the run opens its rows, where the run is encrypted.
    key = options_again([first_way(path)]) if request.encrypt_run else ""
    shown_path = shlex.quote(os.path.relpath(path))
    console.print(f"run     {path}\n\nnext:", soft_wrap=True)
    commands = [f"mst chat {shown_path}{key}", f"mst merge {shown_path}{key}"]
    files = (*manifest.data, *manifest.val_data)
    # `mst eval` judges text alone.
    if "best_eval_loss" in results and not any(each.images for each in files):
        again = key or options_again(each.key for each in files)
        commands.insert(0, f"mst eval {shown_path} --compare base{again}")
    if request.task == "rm":  # it has nothing to say
        commands = []
    for command in (*commands, f"mst runs show {shown_path}"):
        console.print(f"  {command}", soft_wrap=True)
