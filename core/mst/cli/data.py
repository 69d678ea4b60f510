"""`mst data`: what is in data files, what of it is refused or personal, and their encryption."""

from __future__ import annotations

import argparse
import json
import os
import sys
from itertools import chain, islice
from typing import TYPE_CHECKING

from mst.cli import data_scan, encryption
from mst.cli.keys import add_key_options, ring_given
from mst.cli.options import Parser
from mst.errors import EXIT_FAILED, ModelError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mst.data.check import DataCheck, Encoder, FileCheck, Lengths
    from mst.data.formats import Reading

_BAR_CHARACTERS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action and its options, which are named as those of `mst train`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser)
    check = actions.add_parser(
        "check", help="look at all rows: shape, lengths, what is wrong", allow_abbrev=False
    )
    check.add_argument("paths", nargs="+", metavar="PATH", help="as --dataset takes them")
    check.add_argument("--val-dataset", nargs="+", default=[], metavar="PATH", help="held out")
    check.add_argument("--columns", nargs="+", default=[], metavar="COLUMN=ROLE")
    check.add_argument("--dataset-info", "--dataset-dir", metavar="FILE|DIR")
    add_key_options(check)
    check.add_argument("--model", metavar="PATH|NAME", help="whose tokens are counted")
    check.add_argument("--template", metavar="FILE", help="instead of the model's own")
    check.add_argument("--train-on", default="assistant", choices=("assistant", "last", "all"))
    check.add_argument("--max-length", type=int, metavar="TOKENS", help="as in `mst train`")
    check.add_argument(
        "--show", type=int, metavar="N", help="print the first N rows too, on a terminal only"
    )
    check.add_argument("--json", action="store_true", help="JSON on standard output")
    data_scan.add_arguments(actions)
    encryption.add_arguments(actions)


def run(args: argparse.Namespace) -> int:
    """Do what was said; `check` returns 1 when `mst train` would refuse something."""
    if args.action is None:
        raise UsageError(
            "mst data: say what to do: `mst data check PATH`, or `mst data --help` for all."
        )
    if args.action == "scan":
        return data_scan.run(args)
    return encryption.run(args) if args.action in encryption.ACTIONS else _run_check(args)


def _run_check(args: argparse.Namespace) -> int:
    from rich.console import Console

    from mst import serial
    from mst.data.check import check_data, has_problems
    from mst.data.formats import Reading, check_columns_used
    from mst.seal.audit import record
    from mst.seal.audit.facts import hashed_files

    if args.show is not None and (args.json or not sys.stdout.isatty()):
        raise UsageError(
            "mst data check --show prints rows, so it needs a terminal: what goes to a file or a"
            " pipe may be kept. Leave --show out."
        )
    reading = Reading(
        tuple(args.columns),
        "skip",
        args.dataset_info,
        keys=ring_given(args),
        option="PATH",
    )
    said = Console(stderr=True, highlight=False, markup=False)
    encoder, max_length = _encoder(args, said)
    found = check_data(args.paths, args.val_dataset, reading, encoder, max_length)
    checked = [each.path for each in (*found.files, *found.val_files)]
    record("data.checked", files=hashed_files(checked), rows_shown=args.show or 0)
    if args.json:
        json.dump(serial.to_json(found), sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        console = Console(highlight=False, markup=False, emoji=False)
        _show_check(console, found)
        if args.show:
            _show_rows(console, args.paths, reading, args.show)
    files = (*found.files, *found.val_files)
    if not any(each.problem for each in files):
        check_columns_used(reading, [each.columns for each in files])
    return EXIT_FAILED if has_problems(found) else 0


def _encoder(args: argparse.Namespace, said: Console) -> tuple[Encoder | None, int]:
    """Return the model's tokenizer and template, and the longest row in tokens.

    Raises:
        ModelError: the model that was asked for isn't there; without the default, none is used.
    """
    from mst.data.check import Encoder
    from mst.data.prepare import DEFAULT_MAX_LENGTH
    from mst.data.special import read_json
    from mst.data.template import load_template
    from mst.data.tokens import load_tokenizer
    from mst.model.named import named_model
    from mst.request import TrainRequest

    wanted = TrainRequest(model=args.model)
    try:
        named = named_model(
            wanted, os.environ, lambda line: said.print(line + " …", soft_wrap=True)
        )
    except ModelError as error:
        if args.model is not None:
            raise
        said.print(f"no tokens are counted: {error}")
        return None, args.max_length or DEFAULT_MAX_LENGTH
    directory = named.directory
    template = load_template(directory, args.template)
    context = read_json(directory / "config.json").get("max_position_embeddings")
    max_length = args.max_length or min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)
    return Encoder(load_tokenizer(directory), template, args.train_on), max_length


def _show_check(console: Console, found: DataCheck) -> None:
    for words, files in (("data", found.files), ("val", found.val_files)):
        for each in files:
            _show_file(console, words, each)
    if found.lengths is not None:
        _show_lengths(console, found.lengths)
    if found.scripts:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in found.scripts.items())
        console.print(f"scripts {shares} of the letters")
    if found.answers is not None:
        console.print(f"answers {found.answers} different ones: a classification")
    if found.val_files:
        console.print(f"overlap {found.overlap} rows are in both --dataset and --val-dataset")


def _show_file(console: Console, words: str, file: FileCheck) -> None:
    told = f"{file.rows} rows, {file.kind}, {file.shape}" if file.shape else "cannot be read"
    columns = f" ({', '.join(file.columns)})" if file.columns else ""
    console.print(f"{words:<7} {file.path}: {told}{columns}", soft_wrap=True)
    counts = (
        ("duplicates", file.duplicates, file.duplicate_rows),
        ("empty turns", file.empty_turns, file.empty_turn_rows),
    )
    for what, count, numbers in counts:
        if count:
            more = " …" if count > len(numbers) else ""
            shown = ", ".join(map(str, numbers))
            console.print(f"        {what}: {count} (row {shown}{more})", soft_wrap=True)
    for each in file.refused:
        console.print(f"        refused: {each}", soft_wrap=True)
    if file.problem is not None:
        console.print(f"        refused whole: {file.problem}", soft_wrap=True)


def _show_lengths(console: Console, lengths: Lengths) -> None:
    rows = sum(each.rows for each in lengths.histogram)
    console.print(
        f"tokens  {lengths.total} in {rows} rows: half have at most {lengths.median}, 90 %"
        f" {lengths.p90}, 99 % {lengths.p99}, the longest {lengths.longest}"
    )
    most = max(each.rows for each in lengths.histogram)
    for each in lengths.histogram:
        bar = "█" * max(1, round(_BAR_CHARACTERS * each.rows / most))
        console.print(f"  from {each.tokens:>7}  {each.rows:>8}  {bar}", soft_wrap=True)
    console.print(
        f"        {lengths.too_long} rows ({lengths.too_long / rows:.1%}) are longer than"
        f" --max-length {lengths.max_length}"
    )


def _show_rows(console: Console, paths: list[str], reading: Reading, count: int) -> None:
    from mst.data.formats import iter_rows

    rows = chain.from_iterable(iter_rows(path, reading) for path in paths)
    for row in islice(rows, count):
        console.print(f"\n{row.file}, row {row.number}", soft_wrap=True)
        if row.text is not None:
            console.print(_printable(row.text))
        for name, turns in (("", row.messages), ("rejected ", row.rejected)):
            for turn in turns:
                console.print(f"[{name}{turn.role}] {_printable(turn.content)}")
                for call in turn.tool_calls:
                    console.print(f"  calls {json.dumps(call['function'], ensure_ascii=False)}")


def _printable(text: str) -> str:
    """Return text that can't steer the terminal: control characters are written out."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text
    )
