"""All commands as one parser, for what describes them: completion and the manual page."""

from __future__ import annotations

import argparse
import re

from mst.cli import ALIASES, COMMANDS, add_arguments
from mst.cli.options import Parser
from mst.request import TASKS

_CHOICES = re.compile(r"[a-z0-9][a-z0-9_.-]*(?:\|[a-z0-9][a-z0-9_.-]*)+")


def whole_parser(tasks: bool = True) -> Parser:
    """Return a parser of every command with its options, as people should type them.

    Spellings that are taken for the sake of habit (`--max_length`, aliases of other trainers) are
    left out. It parses nothing: `mst.cli` builds the parser of the one command that is called.

    Args:
        tasks: take `mst sft`, `mst dpo` and the like as commands too.
    """
    whole = Parser(prog="mst", description="Fine-tune language models on the hardware you own.")
    whole.add_argument("-V", "--version", action="store_true", help="the versions of all parts")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (_, text) in COMMANDS.items():
        aliases = [alias for alias, of in ALIASES.items() if of == name]
        one = commands.add_parser(name, help=text, aliases=aliases)
        add_arguments(name, one)
        _tidy(one)
    for task in TASKS if tasks else ():
        text = f"mst train with --task {task}"
        one = commands.add_parser(task, help=text)
        add_arguments("train", one)
        _tidy(one)
    return whole


def _tidy(parser: argparse.ArgumentParser) -> None:
    """Leave one spelling of each option, and make choices of what is listed as words."""
    parser.usage = f"{parser.prog} [--option value …]"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _tidy(inner)
            continue
        spelt = [each for each in action.option_strings if "_" not in each]
        action.option_strings = spelt or action.option_strings
        words = action.metavar if isinstance(action.metavar, str) else ""
        if action.choices is None and _CHOICES.fullmatch(words):
            action.choices = words.split("|")
