"""What the menu writes: lines that any terminal and screen reader can follow, one after another."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Sequence

_WIDEST = 100
_WIDE = "\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef"
# Never at the beginning of a line.
_CLOSING = "，。、；：？！）”》…"
# What stays together: a wide character, or a word, with what closes it and its spaces.
_PIECES = re.compile(rf"[{_WIDE}][{_CLOSING}]*\s*|[^\s{_WIDE}]+[{_CLOSING}]*\s*|\s+")


def width() -> int:
    """Return the columns that text may take."""
    return max(20, min(shutil.get_terminal_size().columns, _WIDEST) - 1)


def say(text: str = "") -> None:
    """Print a paragraph, wrapped; Chinese characters take two columns."""
    for line in text.split("\n"):
        print("\n".join(wrapped(visible(line), width())), flush=True)


def heading(text: str) -> None:
    """Print the title of a screen."""
    say(f"\n== {text} ==")


def command_line(arguments: Sequence[str]) -> str:
    """Return a command as one types it."""
    return shlex.join(["mst", *arguments])


def show_command(arguments: Sequence[str]) -> None:
    """Print a command on one line, which can be copied: the terminal alone may break it."""
    print(f"$ {visible(command_line(arguments))}", flush=True)


def wrapped(text: str, columns: int) -> list[str]:
    """Return a text's lines; it is broken at spaces, and between Chinese characters."""
    lines, line, used = [], "", 0
    for piece in _PIECES.findall(text):
        size = cells(piece)
        if used + cells(piece.rstrip()) > columns and line.strip():
            lines.append(line.rstrip())
            line, used = "", 0
        line, used = line + piece, used + size
    return [*lines, line.rstrip()]


def cells(text: str) -> int:
    """Return the columns that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def shortened(text: str, columns: int) -> str:
    """Return a text that takes no more columns than these; what is left out leaves three dots."""
    text = visible(text)
    if cells(text) <= columns:
        return text
    kept = ""
    for each in text:
        if cells(kept + each) > columns - 3:
            break
        kept += each
    return kept + "..."


def visible(text: str) -> str:
    """Return a line that can't steer the terminal: a file's name may hold anything."""
    return "".join(each if each.isprintable() else "?" for each in text.expandtabs(4))


def next_page(start: int, page: int, count: int) -> int:
    """Return where the next page of a list begins; after the last comes the first."""
    return start + page if start + page < count else 0


def padded(text: str, columns: int) -> str:
    """Return a text filled up with spaces to these columns."""
    return text + " " * (columns - cells(text))


def never_fails() -> None:
    """Let standard output replace what its encoding lacks, such as in the name of a file."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
