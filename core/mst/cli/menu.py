"""`mst menu`: everything from choosing a model to serving it, by choosing from lists."""

from __future__ import annotations

import argparse
import os
import sys

from mst.cli.language import add_language_option, language_asked
from mst.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how the menu speaks and draws."""
    add_language_option(parser, "auto")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="numbered lines, nothing written over: for screen readers and simple terminals",
    )


def run(args: argparse.Namespace) -> int:
    """Show the menu until the person leaves it."""
    from mst.menu import draft
    from mst.menu.asking import asking_of
    from mst.menu.home import loop
    from mst.menu.screen import never_fails
    from mst.menu.session import Session
    from mst.menu.words import ascii_alone, words_of

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "mst menu needs a terminal, and standard input or output is none. In scripts, type the"
            " commands that it shows: `mst --help` lists them."
        )
    # Where a slow connection brings the terminal's answer late, it would be read as keys.
    os.environ["PROMPT_TOOLKIT_NO_CPR"] = "1"
    never_fails()
    words = words_of(language_asked(args))
    file = draft.default_path()
    session = Session(
        words=words,
        asking=asking_of(words, os.environ, args.plain),
        environ=os.environ,
        ascii=ascii_alone(os.environ, sys.stdout.encoding),
        draft=draft.load(file),
        draft_file=file,
    )
    return loop(session)
