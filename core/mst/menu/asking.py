"""How the menu asks: a list with arrow keys and numbers, or plain numbered lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mst.menu.screen import say, shortened, visible, width, wrapped
from mst.menu.words import Words

BACK = "back"
# What a list and its question need beside it.
_LEAST_ROWS, _LEAST_COLUMNS = 16, 60
_NUMBER_COLUMNS = 6


@dataclass(frozen=True)
class Choice:
    """One line of a list."""

    value: str
    label: str


@dataclass(frozen=True)
class Asking:
    """How a person is asked. Both raise KeyboardInterrupt for Ctrl-C, and EOFError for the end.

    Attributes:
        choose: takes the question, the choices and the value of the one that Enter takes; returns
            the value that was taken. Esc, or "b", takes `BACK` where that is a choice.
        ask: takes a question, a text that Enter takes, and whether it is a path; returns the line,
            or None for Esc.
        animated: the terminal can be written over, and a text that is given can be changed.
        in_words: returns the same way to ask in another language; None where it says nothing of
            its own.
        forget: drops the keys that were pressed while something else went on; they answer no
            question that was yet to be seen.
    """

    choose: Callable[[str, Sequence[Choice], str], str]
    ask: Callable[[str, str, bool], str | None]
    animated: bool
    in_words: Callable[[Words], Asking] | None = None
    forget: Callable[[], None] = lambda: None


def asking_of(words: Words, environ: Mapping[str, str], plain: bool) -> Asking:
    """Return how to ask on this terminal: plainly where it is asked for, or can't do more."""
    if plain or _is_small() or environ.get("TERM", "dumb") in ("dumb", "unknown", ""):
        return plainly(words)
    try:
        import prompt_toolkit  # noqa: F401
    except ImportError:
        return plainly(words)
    return with_arrows(words)


def _is_small() -> bool:
    size = os.get_terminal_size(sys.stdout.fileno())
    return size.lines < _LEAST_ROWS or size.columns < _LEAST_COLUMNS


def plainly(words: Words) -> Asking:
    """Return a way to ask that writes lines and reads lines, for screen readers too."""

    def choose(question: str, choices: Sequence[Choice], default: str) -> str:
        values = [each.value for each in choices]
        default = default if default in values else values[0]
        say(question)
        for number, each in enumerate(choices, 1):
            mark = ">" if each.value == default else " "
            say(f"{mark} {number}. {visible(each.label)}")
        while True:
            line = input(words("asking.number", default=values.index(default) + 1)).strip()
            if not line:
                return default
            if line.lower() == "b" and BACK in values:
                return BACK
            if line.isdecimal() and 1 <= int(line) <= len(values):
                return values[int(line) - 1]
            say(words("asking.no_number", most=len(values)))

    def ask(question: str, given: str, is_path: bool) -> str:
        return input(f"{question} [{given}] " if given else f"{question} ").strip() or given

    return Asking(choose, ask, animated=False, in_words=plainly, forget=_forget)


def _forget() -> None:
    import termios

    with suppress(termios.error):  # of a terminal that is gone, as the next question tells
        termios.tcflush(sys.stdin, termios.TCIFLUSH)


def _folded(label: str, columns: int) -> str:
    """Return a label on as many lines as it needs; the list writes a number before the first."""
    return ("\n" + " " * _NUMBER_COLUMNS).join(wrapped(visible(label), columns))


def with_arrows(words: Words) -> Asking:
    """Return a way to ask with prompt_toolkit; plainly while the window is too small for lists."""
    plain = plainly(words)

    def choose(question: str, choices: Sequence[Choice], default: str) -> str:
        if _is_small():
            return plain.choose(question, choices, default)
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.key_binding.key_processor import KeyPress, KeyPressEvent
        from prompt_toolkit.keys import Keys
        from prompt_toolkit.shortcuts.choice_input import ChoiceInput

        keys = KeyBindings()
        values = [each.value for each in choices]
        if BACK in values:

            @keys.add("escape")
            def go_back(event: KeyPressEvent) -> None:
                event.app.exit(result=BACK)

        # What was typed before the terminal is read key by key has a line feed for Enter.
        @keys.add("c-j", eager=True)
        def enter(event: KeyPressEvent) -> None:
            event.key_processor.feed(KeyPress(Keys.ControlM, "\r"), first=True)

        # The list would take a number beyond its end for the last, which leads back.
        for number in range(len(values) + 1, 10):

            @keys.add(str(number), eager=True)
            def pass_over(event: KeyPressEvent) -> None:
                return None

        @keys.add("c-d")
        def leave(event: KeyPressEvent) -> None:
            event.app.exit(exception=EOFError())

        room = width() - 12
        listed = ChoiceInput(
            message=shortened(question, width() - 3),
            options=[(each.value, _folded(each.label, room)) for each in choices],
            default=default if default in values else values[0],
            key_bindings=keys,
        )
        return listed.prompt()

    def ask(question: str, given: str, is_path: bool) -> str | None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import PathCompleter
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.key_binding.key_processor import KeyPressEvent

        keys = KeyBindings()

        @keys.add("escape")
        def go_back(event: KeyPressEvent) -> None:
            event.app.exit(result=None)

        line: PromptSession[str | None] = PromptSession(
            f"{question} ",
            completer=PathCompleter(expanduser=True) if is_path else None,
            complete_while_typing=False,
            reserve_space_for_menu=4 if is_path else 0,
            key_bindings=keys,
        )
        found = line.prompt(default=given)
        return None if found is None else found.strip()

    def forget() -> None:
        from prompt_toolkit.application.current import get_app_session
        from prompt_toolkit.input.typeahead import clear_typeahead

        _forget()
        clear_typeahead(get_app_session().input)  # what came in one piece with an answer

    return Asking(choose, ask, animated=True, in_words=with_arrows, forget=forget)
