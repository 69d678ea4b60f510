"""`mst man`: the manual page of all commands and options, as `man` reads it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator

from mst.errors import UsageError
from mst.request import TASKS

_REQUEST = re.compile(r"\.(?:TH|SH|SS|TP|RS|RE|B|I|ad)\b")
_MORE = """\
.SH TASKS
{tasks} are mst train with that \\-\\-task.
.SH EXIT STATUS
.TP
0
done
.TP
1
failed; one message says what was asked, what was found and what to do
.TP
2
wrong usage: an unknown command, option, key or value
.TP
3
refused by a rule of the seal: no jail, a host that was not named, or a log that was changed
.TP
4
the device was lost; what was saved is whole
.TP
5
memory ran out; what was saved is whole
.TP
6
the jail leaks; nothing was started
.TP
130
interrupted; what was done is saved
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take no options."""


def run(args: argparse.Namespace) -> int:
    """Print the page."""
    sys.stdout.write(page())
    return 0


def page() -> str:
    """Return the page in roff.

    Raises:
        UsageError: what makes it is not installed.
    """
    if importlib.util.find_spec("argparse_manpage") is None:
        raise UsageError(
            "mst man needs argparse-manpage, which is not installed here. Install it: python -m pip"
            " install 'mst-train[shell]'"
        )
    from argparse_manpage.manpage import Manpage

    from mst import __version__
    from mst.cli.whole import whole_parser

    about = {
        "prog": "mst",
        "description": "fine-tune language models on the hardware you own",
        "version": __version__,
        # The page is of a version, not of the day on which it was printed.
        "date": f"version {__version__}",
        "manual_title": "MST",
        "project_name": "mst-train",
    }
    # argparse breaks lines for a terminal's width, where man breaks them by itself.
    with _columns(80):
        made = str(Manpage(whole_parser(tasks=False), about, format="single-commands-section"))
    more = _MORE.format(tasks=", ".join(f"mst {task}" for task in TASKS))
    return "".join(map(_roff, f"{made.rstrip()}\n{more}".splitlines(keepends=True)))


@contextlib.contextmanager
def _columns(width: int) -> Iterator[None]:
    """Have argparse write for a terminal of some width."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _roff(line: str) -> str:
    """Return a line as roff takes it: in ASCII, and a text that begins with a dot is no request."""
    if line.startswith(".TH "):  # long options can't be spread over a line
        line += ".ad l\n"
    elif line[:1] in (".", "'") and not _REQUEST.match(line):
        line = rf"\&{line}"
    return "".join(each if each.isascii() else f"\\[u{ord(each):04X}]" for each in line)
