"""What may be said of an exception, a warning or a log record that might quote a row.

Libraries put values into their messages: `json.JSONDecodeError.doc` holds the whole text, pyarrow
quotes the cell that it can't cast, a user's reward function the completion. So messages that mst
has not written itself are never shown; where something happened, and its type, always are.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TextIO

WITHHELD = "its text is withheld, it might quote a row"
# Frames between a library's call of a logger and the record; transformers wraps its loggers twice.
_FRAMES = 12
# A chain of exceptions this long says nothing more.
_CHAIN = 10


def without_text(error: BaseException) -> str:
    """Return an exception as a traceback's lines, by places and types: no message, note or value.

    What caused it comes first, as in Python's own tracebacks, and the members of a group last.
    """
    return "".join(_lines(error, set()))


def _lines(error: BaseException, seen: set[int]) -> Iterator[str]:
    if id(error) in seen or len(seen) >= _CHAIN:
        return
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _lines(before, seen)
        yield "which led to:\n"
    # The lines of source code that these quote are the program's, not its data.
    yield from traceback.format_tb(error.__traceback__)
    yield f"{type(error).__name__}{_known_of(error)} ({WITHHELD})\n"
    members: Any = getattr(error, "exceptions", ())
    for each in members if isinstance(members, tuple) else ():
        if isinstance(each, BaseException):
            yield "which holds:\n"
            yield from _lines(each, seen)


def place_of(error: BaseException) -> str:
    """Return an exception's type and the line that raised it, in a few words."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


def _known_of(error: BaseException) -> str:
    """Return what a type of exception tells besides its text, and that is no value."""
    if isinstance(error, SyntaxError):
        return f" in {error.filename}:{error.lineno}"
    if isinstance(error, OSError) and error.errno is not None:
        return f" {errno.errorcode.get(error.errno, '')}"
    return ""


def bug_report(error: BaseException) -> str:
    """Return what is printed of an error that nobody expected."""
    if isinstance(error, MemoryError):
        end = "This machine's memory ran out: give it fewer or shorter rows, or a smaller model."
        return f"{without_text(error)}{end}\n"
    return f"{without_text(error)}This is a bug in mst. Please report the lines above.\n"


def quieten() -> Callable[[], None]:
    """Keep texts that Python or a library would print by itself out of this process's output.

    Uncaught exceptions, those of threads, of finalizers and of exit handlers, warnings and log
    records are shown by their type and place. A log message that is a literal of the code that
    logs it is kept, without its arguments.

    Returns:
        What puts the former hooks back.
    """
    former = sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning
    factory = logging.getLogRecordFactory()
    shown: set[tuple[str, int]] = set()

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        # Python shows a text once; of those that differ by the row alone, one is enough.
        if (filename, lineno) not in shown:
            shown.add((filename, lineno))
            _say(f"{category.__name__} at {filename}:{lineno} ({WITHHELD})\n")

    def record(
        name: str, level: int, path: str, line: int, message: object, args: object, exc_info: Any,
        *rest: Any, **more: Any,
    ) -> logging.LogRecord:  # fmt: skip
        literal = _is_literal(message, sys._getframe(1))
        kept = message if literal else f"{path}:{line} ({WITHHELD})"
        kind = exc_info[0] if isinstance(exc_info, tuple) else None
        told = kept if kind is None else f"{kept} ({kind.__name__})"
        return factory(name, level, path, line, told, (), None, *rest, **more)

    def restore() -> None:
        sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = former
        logging.setLogRecordFactory(factory)

    sys.excepthook = _show_uncaught
    threading.excepthook = _show_of_thread
    sys.unraisablehook = _show_unraisable
    warnings.showwarning = show_warning
    logging.setLogRecordFactory(record)
    return restore


@contextmanager
def quiet() -> Iterator[None]:
    """Do as `quieten` says while the block runs."""
    restore = quieten()
    try:
        yield
    finally:
        restore()


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(text)


def _show_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    _say("Interrupted.\n" if issubclass(kind, KeyboardInterrupt) else bug_report(error))


def _show_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        _say(without_text(args.exc_value))


def _show_unraisable(args: Any) -> None:
    if args.exc_type is KeyboardInterrupt:
        _interrupt_again()
    # args.object may be a bound method, whose repr quotes its owner's.
    elif args.exc_value is not None:
        _say(without_text(args.exc_value))


def _interrupt_again(seconds: float = 0.05) -> None:
    """Send Ctrl-C once more: the first came in a finalizer, where Python drops what is raised."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    try:
        timer.start()
    except KeyboardInterrupt:  # a busy machine has not let the hook end before it came
        _interrupt_again(2 * seconds)
    except RuntimeError:
        pass  # no thread starts in a process that is ending anyway


def _is_literal(message: object, frame: FrameType | None) -> bool:
    """Return whether a message stands as it is in the code that led to its record."""
    for _ in range(_FRAMES):
        if frame is None or not isinstance(message, str):
            return False
        if any(each is message or each == message for each in frame.f_code.co_consts):
            return True
        frame = frame.f_back
    return False
