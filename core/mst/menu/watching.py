"""Watching a work in the background: it goes on when nobody does."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mst import background
from mst.background import Work
from mst.menu.progress import Progress, progress_of
from mst.menu.screen import (
    cells,
    heading,
    say,
    shortened,
    show_command,
    visible,
    width,
    wrapped,
)
from mst.menu.session import Session

_SECONDS = 0.5
# Times as long as the last look took, so that looking takes no more than a tenth of a core.
_REST = 9
# Between two lines where nothing can be written over.
_LINE_SECONDS = 10.0


def watch(session: Session, work: Work) -> Work:
    """Show how a work goes until it has ended, or the person leaves; return it as it is then.

    Ctrl-C leaves too: asked whether to leave the menu, a person who stays would be led back to the
    screen before, and begin the work again.
    """
    words = session.words
    heading(words("watch.title"))
    show_command(work.arguments)
    say(words("watch.hint" if session.asking.animated else "watch.hint_plain"))
    if background.run_of(work) is not None:
        say(words("watch.means"))
    shown = _Shown(session)
    with _keys(session.asking.animated):
        try:
            ended = _until_left(session, work, shown)
        except KeyboardInterrupt:
            ended = None
    session.asking.forget()  # a key that meant to leave, as the work ended
    if ended is None:
        shown.clear()
        say(words("watch.goes_on"))
    return ended or background.read(work.directory) or work


def _until_left(session: Session, work: Work, shown: _Shown) -> Work | None:
    """Return the work as it has ended; None when the person leaves before."""
    animated = session.asking.animated
    while True:
        began = time.process_time()
        work = background.read(work.directory) or work
        shown.show(progress_of(session.words, work, session.ascii), work.state != "running")
        if work.state != "running":
            return work
        # Reading and drawing 50,000 steps takes 0.2 s, which the run itself could use.
        key = _key(max(_SECONDS, _REST * (time.process_time() - began)), animated)
        if key == "s":
            shown.clear()
            background.stop(work)
            say(session.words("watch.stopping"))
        elif key:
            return None


class _Shown:
    """What is on the terminal of a work's progress, to be written over or added to."""

    def __init__(self, session: Session) -> None:
        self._animated = session.asking.animated
        self._lines: list[str] = []
        self._last = ""
        self._next = 0.0

    def show(self, progress: Progress, ended: bool) -> None:
        """Show a moment; without an animated terminal, now and then."""
        if self._animated:
            self.clear()
            room = max(1, os.get_terminal_size(sys.stdout.fileno()).lines - 8)
            drawn = [shortened(each, width()) for each in progress.lines[-room:]]
            lines = [*drawn, *wrapped(visible(progress.line), width())]
            print("\n".join(lines))
            self._lines = lines
            sys.stdout.flush()
        elif progress.line != self._last and (ended or time.monotonic() >= self._next):
            say(progress.line)
            self._last, self._next = progress.line, time.monotonic() + _LINE_SECONDS

    def clear(self) -> None:
        """Take away what may be written over."""
        if self._lines:
            # A window that has become narrower has broken them anew.
            columns = os.get_terminal_size(sys.stdout.fileno()).columns or 80
            rows = sum(max(1, -(-cells(each) // columns)) for each in self._lines)
            # Up so many lines, and erase to the end of the screen (ECMA-48, CPL and ED).
            sys.stdout.write(f"\x1b[{rows}F\x1b[J")
            self._lines = []


@contextmanager
def _keys(single: bool) -> Iterator[None]:
    """Let single keys be read, unseen; Ctrl-C stays what it is."""
    if not single:
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _key(seconds: float, single: bool) -> str:
    """Return the key, or the line's first, that was typed within these seconds; "" for none.

    Raises:
        EOFError: the terminal is gone.
    """
    if not select.select([sys.stdin], [], [], seconds)[0]:
        return ""
    data = os.read(sys.stdin.fileno(), 64)
    if not data:
        raise EOFError
    return data.decode("utf-8", "replace")[0].lower() if single or data != b"\n" else "\n"
