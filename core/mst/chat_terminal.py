"""A conversation in the terminal, with whatever answers it. Nothing is written to disk."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from mst.data.rows import Message
from mst.errors import MstError

COMMANDS = """\
/reset          forget the conversation
/system TEXT    begin anew with this system message; without TEXT, with none
/exit           leave; Ctrl-D too
Ctrl-C stops an answer. Put a space before a message that begins with /."""


class Talks(Protocol):
    """What answers conversations."""

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """Yield the next answer's text as it comes.

        Raises:
            MstError: there is none; the conversation can go on without this turn.
        """
        ...


def printable(text: str) -> str:
    """Return the text without the characters that steer a terminal: a model may write any."""
    return "".join(each for each in text if each in "\n\t" or each.isprintable())


def opening(system: str | None) -> list[Message]:
    """Return the messages with which a conversation begins."""
    return [] if not system else [Message("system", system)]


def ask_once(talks: Talks, system: str | None, prompt: str) -> None:
    """Print the answer to a prompt, and nothing else, on standard output."""
    for piece in talks.answer([*opening(system), Message("user", prompt)]):
        print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    print()


def edit_lines() -> None:
    """Let lines be edited and recalled; their history stays in memory."""
    with suppress(ImportError):
        import readline  # noqa: F401


def converse(talks: Talks, title: str, system: str | None) -> None:
    """Read messages and stream answers until the user leaves.

    Args:
        talks: answers.
        title: who that is, for the greeting.
        system: message that the conversation begins with.
    """
    print(f"{title}. /help lists the commands; Ctrl-D leaves.")
    messages = opening(system)
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            changed = _command(line, messages)
            if changed is None:
                return
            messages = changed
        elif line.strip():
            messages = _turn(talks, messages, line)


def _read_line() -> str | None:
    """Return the next line, or None when the user leaves."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:
            print("\nCtrl-D leaves.")


def _command(line: str, messages: list[Message]) -> list[Message] | None:
    """Return the conversation after a command; None to leave."""
    name, _, rest = line.partition(" ")
    if name == "/exit":
        return None
    if name == "/reset":
        print("The conversation begins anew.")
        return [each for each in messages if each.role == "system"]
    if name == "/system":
        print("The conversation begins anew, with" + ("" if rest.strip() else "out") + " a system"
              " message.")  # fmt: skip
        return opening(rest.strip())
    print(COMMANDS if name == "/help" else f"{name} is no command.\n{COMMANDS}")
    return messages


def _turn(talks: Talks, messages: list[Message], line: str) -> list[Message]:
    """Return the conversation with the line and its answer; without both if there is none."""
    asked = [*messages, Message("user", line.strip())]
    pieces: list[str] = []
    stopping: list[int] = []

    def stop(number: int, frame: object) -> None:
        # A KeyboardInterrupt raised inside a library's callback can get lost there, so the first
        # Ctrl-C is only noted and looked at between tokens.
        if stopping:
            raise KeyboardInterrupt
        stopping.append(number)

    before = signal.signal(signal.SIGINT, stop)
    try:
        for piece in talks.answer(asked):
            pieces.append(piece)
            print(printable(piece), end="", flush=True)
            if stopping:
                break
    except KeyboardInterrupt:
        stopping.append(signal.SIGINT)
    except MstError as error:
        print(f"{type(error).__name__}: {error}", end="")
    finally:
        signal.signal(signal.SIGINT, before)
    if stopping:
        print(" [stopped]", end="")
    print()
    return [*asked, Message("assistant", "".join(pieces))] if pieces else messages
