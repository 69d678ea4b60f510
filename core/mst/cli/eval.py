"""`mst eval`: figures of a run or a model on rows it has not seen, and how sure they are."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mst.cli.keys import add_key_options, ring_given
from mst.errors import EvaluationError, UsageError
from mst.evaluate.choice import AUTO, AUTO_ANSWERS, METRICS
from mst.seal.supply.before_use import add_signature_options, verify_before_use

if TYPE_CHECKING:
    from rich.console import Console

    from mst.evaluate.figures import Figure
    from mst.evaluate.report import EvalReport, Judged

_METRICS_HELP = f"""
metrics:
  loss         cross-entropy of the label tokens, as training's held-out loss; perplexity
  labels       classification: the answer of the set that is most likely, and free generation
  exact_match  generated answer equal to the last assistant's turn; also folded (case, width, space)
  rouge        ROUGE-1, -2 and -L, mean F1 (Han and kana letter by letter)
  bleu, chrf   of the whole set, as sacrebleu; Chinese references are split as its "zh"
  json         share of answers that are JSON, and that equal the reference's
  auto         loss; then labels for a classification, else exact_match, rouge, bleu and chrf when
               at most {AUTO_ANSWERS} rows are judged

Answers are generated greedily. Intervals are 95 %, by {{resamples}} bootstrap draws of rows, which
two models share: "no difference shown" means that the difference's interval holds 0.
Nothing of a row is printed or written, but to --predictions.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is judged, on which rows, and how."""
    from mst.evaluate.figures import RESAMPLES

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _METRICS_HELP.format(resamples=RESAMPLES)
    add = parser.add_argument
    add("target", nargs="?", metavar="RUN|MODEL", help="as of mst chat (the newest finished run)")
    add("--checkpoint", metavar="last|best|STEP", help="of the run")
    add("--dataset", nargs="+", metavar="FILE", default=(),
        help="rows to judge by (those that the run held out)")  # fmt: skip
    add_key_options(parser)
    add("--metric", nargs="+", default=(AUTO,), metavar="NAME",
        help=f"of {AUTO}, {', '.join(METRICS)}; see below ({AUTO})")  # fmt: skip
    add("--metric-file", metavar="FILE[:FUNCTION]",
        help="a Python file of your own, which is run: metric(predictions, references) returns a"
        " number, or a list of one number a row")  # fmt: skip
    add("--compare", metavar="base|RUN|MODEL", help="judge this one too, on the same rows")
    add("--max-new-tokens", type=int, default=256, help="longest answer (256)")
    add("--max-length", type=int, help="longest row in tokens (the run's, or the model's context)")
    add("--limit", type=int, help="rows, spread evenly over all (all)")
    add("--batch-size", type=int, default=16, help="most rows in one pass (16)")
    add("--device", default="auto", help="as of mst train (auto)")
    add_signature_options(parser)
    add("--seed", type=int, default=0, help="of the bootstrap (0)")
    add("--json", action="store_true", help="JSON on standard output")
    add("--output", metavar="FILE", help="write the JSON there too")
    add("--predictions", metavar="FILE",
        help="write references and answers there as JSON lines, readable by you alone")  # fmt: skip
    group = parser.add_argument_group(
        "lm-evaluation-harness", "tasks from local files, instead of rows and metrics"
    )
    add = group.add_argument
    add("--harness", nargs="+", metavar="TASK", default=(), help="names of the tasks")
    add("--tasks-dir", metavar="DIR", help="their YAML files; a !function in them is run")
    add("--harness-python", metavar="FILE", help="of the environment that has lm_eval (this one)")
    add("--apply-chat-template", action="store_true", help="ask as in a chat")


def run(args: argparse.Namespace) -> int:
    """Judge, and print a table or JSON."""
    from rich.console import Console

    from mst import serial
    from mst.durable import write_text
    from mst.evaluate.job import EvalRequest, check_target, evaluate, prepare_evaluation
    from mst.seal.audit import record
    from mst.seal.audit.facts import evaluation_facts, report_facts

    _check_numbers(args)
    output = None if args.output is None else Path(args.output)
    if output is not None:
        check_target(output, "--output")
    request = EvalRequest(
        target=args.target,
        checkpoint=args.checkpoint,
        dataset=tuple(args.dataset),
        metrics=tuple(args.metric),
        metric_file=args.metric_file,
        compare=args.compare,
        max_new_tokens=args.max_new_tokens,
        max_length=args.max_length,
        limit=args.limit,
        batch_rows=args.batch_size,
        device=args.device,
        seed=args.seed,
        predictions=args.predictions,
        harness=tuple(args.harness),
        tasks_dir=args.tasks_dir,
        harness_python=args.harness_python,
        apply_chat_template=args.apply_chat_template,
    )
    keys = ring_given(args)
    job = prepare_evaluation(request, os.environ, keys)
    verify_before_use(Path(job.subject.model.weights), args.model_signature, args.model_public_key)
    record("eval.begun", **evaluation_facts(job))
    if request.harness:
        from mst.evaluate.harness import run_tasks

        report = run_tasks(job, os.environ)
    else:
        report = evaluate(job, os.environ, keys)
    record("eval.ended", **report_facts(report))
    if output is not None:
        try:
            write_text(output, serial.dumps(report))
        except OSError as error:
            raise EvaluationError(
                f"cannot write --output {output}: {error.strerror}. Choose another file."
            ) from None
    if args.json:
        print(serial.dumps(report), end="")
        return 0
    console = Console(highlight=False, markup=False)
    show_report(console, report, args.compare)
    if args.predictions:
        console.print(f"answers {args.predictions}: it holds rows; mode 0600", soft_wrap=True)
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "limit", "batch_size", "max_length"):
        value = getattr(args, name)
        least = 2 if name == "max_length" else 1
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be at least {least}; found {value}.")
    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed must be 0 or more, below 2^63; found {args.seed}.")


def show_report(console: Console, report: EvalReport, compared: str | None) -> None:
    """Print a report as a table, with what its figures are of."""
    from mst.cli.runs import print_table

    other = report.compared_with
    for name, judged in (("model", report.model), ("against", other)):
        if judged is not None:
            console.print(f"{name:<8}{_described(judged, report.device)}", soft_wrap=True)
    left = f", {report.left_out} left out" if report.left_out else ""
    tokens = f"; {report.label_tokens} label tokens of {report.tokens}" if report.tokens else ""
    console.print(f"rows    {report.rows}, {report.rows_of}{left}{tokens}\n", soft_wrap=True)
    if other is None:
        headings = ["metric", "value", "95 % interval"]
    else:
        names = ["base", "tuned"] if compared == "base" else ["against", "model"]
        headings = ["metric", *names, "difference", "95 % interval", "verdict"]
    rows = [_cells(each, other is not None) for each in report.figures]
    print_table(console, [headings, *rows])
    console.print()
    for note in report.notes:
        console.print(f"note    {note}", soft_wrap=True)


def _described(judged: Judged, device: str) -> str:
    rates = [
        f"{rate:.0f} tokens/s {what}"
        for rate, what in (
            (judged.loss_tokens_per_second, "read"),
            (judged.answer_tokens_per_second, "written"),
        )
        if rate is not None
    ]
    return "; ".join([f"{judged.name}, {judged.dtype} on {device}", *rates])


def _cells(each: Figure, compared: bool) -> list[str]:
    if not compared:
        return [each.name, _number(each.value), _between(each.interval)]
    return [
        each.name,
        _number(each.before),
        _number(each.value),
        _number(each.difference, "+.4g"),
        _between(each.difference_interval),
        each.verdict or "",
    ]


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def _between(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4g} … {interval[1]:.4g}"
