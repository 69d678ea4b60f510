"""A conversation in the terminal, with whatever answers it. Nothing is written to disk."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from mst.data.rows import Message
from mst.errors import MstError
from mst.translation import translated, translated_error

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


def converse(talks: Talks, title: str, system: str | None, language: str = "en") -> None:
    """Read messages and stream answers until the user leaves.

    Args:
        talks: answers.
        title: who that is, for the greeting.
        system: message that the conversation begins with.
        language: of what is said around the answers, of `mst.translation.LANGUAGES`.
    """
    print(translated(f"{title}. /help lists the commands; Ctrl-D leaves.", language))
    messages = opening(system)
    while (line := _read_line(language)) is not None:
        if line.startswith("/"):
            changed = _command(line, messages, language)
            if changed is None:
                return
            messages = changed
        elif line.strip():
            messages = _turn(talks, messages, line, language)


def _read_line(language: str) -> str | None:
    """Return the next line, or None when the user leaves."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:
            print(f"\n{translated('Ctrl-D leaves.', language)}")


def _command(line: str, messages: list[Message], language: str) -> list[Message] | None:
    """Return the conversation after a command; None to leave."""
    name, _, rest = line.partition(" ")
    if name == "/exit":
        return None
    if name == "/reset":
        print(translated("The conversation begins anew.", language))
        return [each for each in messages if each.role == "system"]
    if name == "/system":
        told = (
            "The conversation begins anew, with a system message."
            if rest.strip()
            else "The conversation begins anew, without a system message."
        )
        print(translated(told, language))
        return opening(rest.strip())
    if name != "/help":
        print(translated(f"{name} is no command.", language))
    print(translated(COMMANDS, language))
    return messages


def _turn(talks: Talks, messages: list[Message], line: str, language: str) -> list[Message]:
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
        print(translated_error(type(error).__name__, str(error), language), end="")
    finally:
        signal.signal(signal.SIGINT, before)
    if stopping:
        print(f" [{translated('stopped', language)}]", end="")
    print()
    return [*asked, Message("assistant", "".join(pieces))] if pieces else messages
