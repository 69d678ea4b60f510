"""`--lang`: of commands that a person who does not read English is shown, as by the menu."""

from __future__ import annotations

import argparse
import os
import sys

from mst.translation import LANGUAGES, language_of


def add_language_option(parser: argparse.ArgumentParser, default: str = "en") -> None:
    """Add the option; logs, scripts and searches rely on English."""
    parser.add_argument(
        "--lang",
        choices=("auto", *LANGUAGES),
        default=default,
        help=f"English or Chinese; auto as the locale says ({default})",
    )


def language_asked(args: argparse.Namespace) -> str:
    """Return the language to speak, of `LANGUAGES`; one that this output can show."""
    return language_of(args.lang, os.environ, sys.stdout.encoding)
