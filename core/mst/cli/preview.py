"""`mst preview`: each token of some rows, with or without loss, as `mst train` would have them."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from mst.cli.options import add_train_options, given_options, train_request
from mst.errors import EXIT_FAILED, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mst.data.encode import Example
    from mst.data.preview import Preview
    from mst.data.tokens import TextTokenizer

ROWS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `mst train`, and which rows to show."""
    add_train_options(parser)
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"how many ({ROWS})")
    parser.add_argument(
        "--first", type=int, default=1, metavar="K", help="begin with the K-th row (1)"
    )
    parser.add_argument(
        "--no-text",
        action="store_true",
        help="token ids and counts instead of text; needs no terminal",
    )


def run(args: argparse.Namespace) -> int:
    """Show rows; return 1 when `mst train` would refuse one of them."""
    from rich.console import Console

    from mst.data.formats import read
    from mst.data.prepare import DEFAULT_MAX_LENGTH, reading_of
    from mst.data.preview import preview
    from mst.data.template import load_template
    from mst.data.tokens import load_tokenizer
    from mst.inputs import with_defaults
    from mst.model.files import read_config
    from mst.model.named import named_model
    from mst.seal.audit import record
    from mst.seal.audit.facts import data_facts
    from mst.seal.keys.ring import ring_of
    from mst.training.objectives import find_objective

    if not (args.no_text or sys.stdout.isatty()):
        raise UsageError(
            "mst preview prints rows, so it needs a terminal: what goes to a file or a pipe may be"
            " kept. Pass --no-text for token ids and counts."
        )
    if args.rows < 1 or args.first < 1:
        raise UsageError("mst preview --rows and --first count from 1.")
    request = with_defaults(train_request(args), given_options(args))
    said = Console(stderr=True, highlight=False, markup=False)
    named = named_model(request, os.environ, lambda line: said.print(line + " …"))
    directory = named.directory
    tokenizer = load_tokenizer(directory)
    template = load_template(directory, request.template)
    context = read_config(directory).get("max_position_embeddings")
    max_length = request.max_length or min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)
    keys = ring_of(request.key_file, request.passphrase_file, request.pkcs11)
    data = read(request.dataset, reading_of(request, keys))
    rows = data.rows
    record("preview.shown", first=args.first, rows=args.rows, text=not args.no_text,
           data=data_facts(data.files))  # fmt: skip
    chosen = rows[args.first - 1 : args.first - 1 + args.rows]
    if not chosen:
        raise UsageError(f"mst preview --first {args.first}: there are only {len(rows)} rows.")
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    objective = find_objective(request)
    failed = False
    for row in chosen:
        found = preview(row, tokenizer, template, max_length, request, objective)
        _show(console, found, tokenizer, args.no_text)
        failed |= bool(found.refusal)
    return EXIT_FAILED if failed else 0


def _show(console: Console, found: Preview, tokenizer: TextTokenizer, no_text: bool) -> None:
    row = found.row
    console.print(f"\n{row.file}, row {row.number}", style="bold")
    if found.refusal:
        console.print(f"refused: {found.refusal}", style="red")
    elif not found.examples:
        console.print("left out: too long, or nothing with loss is left", style="yellow")
    for number, example in enumerate(found.examples, start=1):
        part = f"piece {number} of {len(found.examples)}: " if len(found.examples) > 1 else ""
        _show_example(console, part, example, tokenizer, no_text)
        if example.rejected is not None:
            _show_example(console, "rejected: ", example.rejected, tokenizer, no_text)


def _show_example(
    console: Console, part: str, example: Example, tokenizer: TextTokenizer, no_text: bool
) -> None:
    from rich.text import Text

    from mst.data.encode import IGNORE
    from mst.data.preview import pieces

    learned = len(example.labels) - example.labels.count(IGNORE)
    console.print(f"{part}{len(example.input_ids)} tokens, {learned} with loss")
    shown = Text()
    before = 0.0
    for place, piece in enumerate(pieces(example, tokenizer)):
        # Brackets say it without colour too; every other token is underlined to tell them apart.
        if piece.weight != before:
            shown.append("⟧" if before else "", "bold green")
            factor = f"×{piece.weight:g} " if piece.weight not in (0, 1) else ""
            shown.append(f"⟦{factor}" if piece.weight else "", "bold green")
        before = piece.weight
        style = ("green" if piece.weight else "dim") + (" underline" if place % 2 else "")
        shown.append(" ".join(map(str, piece.ids)) + " " if no_text else piece.text, style)
    shown.append("⟧" if before else "", "bold green")
    console.print(shown)
