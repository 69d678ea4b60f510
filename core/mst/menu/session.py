"""What the screens of one menu share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mst.menu import draft as drafts
from mst.menu.asking import BACK, Asking, Choice
from mst.menu.draft import Draft
from mst.menu.words import Words
from mst.translation import translated_lines

if TYPE_CHECKING:
    from mst.facts import MachineFacts


@dataclass
class Session:
    """One menu. It changes as the person chooses; what must outlive it lies in files.

    Attributes:
        words: its texts.
        asking: how it asks.
        environ: of the process.
        ascii: nothing else may be shown.
        draft: the choices so far.
        draft_file: where they are kept.
        machine: what is here, once it was looked at.
    """

    words: Words
    asking: Asking
    environ: Mapping[str, str]
    ascii: bool
    draft: Draft
    draft_file: Path
    machine: MachineFacts | None = None

    def keep(self, draft: Draft) -> None:
        """Take new choices, and keep them."""
        self.draft = draft
        drafts.save(self.draft_file, draft)

    def choose(
        self,
        question: str,
        choices: Sequence[tuple[str, str]],
        default: str = "",
        back: str = "asking.back",
    ) -> str:
        """Return what was chosen of (value, label) pairs, to which the way back is added."""
        last = Choice(BACK, self.words(back))
        return self.asking.choose(question, [*(Choice(*each) for each in choices), last], default)

    def edited(self, question: str, given: str, is_path: bool) -> str | None:
        """Return a text that begins as it is given, where it can be changed; None for Esc.

        On a plain terminal Enter would take what is given, and nothing could not be said.
        """
        return self.asking.ask(question, given if self.asking.animated else "", is_path)

    def confirmed(self, question: str) -> bool:
        """Return whether the answer is yes; Enter alone is no, and so is Esc."""
        choices = [Choice(BACK, self.words("asking.no")), Choice("yes", self.words("asking.yes"))]
        return self.asking.choose(question, choices, BACK) == "yes"

    def facts(self) -> MachineFacts:
        """Return what is known of this machine; asked once, in about a second."""
        if self.machine is None:
            from mst.menu.screen import say
            from mst.probe import machine_facts
            from mst.registry import load

            say(self.words("machine.looking"))
            self.machine = machine_facts(load())
        return self.machine


def in_language(words: Words, arguments: Sequence[str]) -> list[str]:
    """Return a command that has `--lang`, as it is typed to be told the same in this language."""
    return [*arguments, *(() if words.language == "en" else ("--lang", words.language))]


def run_here(arguments: Sequence[str], words: Words | None = None) -> int:
    """Run `mst …` in this terminal and return its exit code; Ctrl-C ends it alone.

    Args:
        arguments: after `mst`.
        words: in whose language errors are said; None where standard error is drawn on.
    """
    stderr = None if words is None else subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-m", "mst", *arguments],
        stderr=stderr,
        encoding=sys.stdout.encoding,
        errors="replace",
    ) as command:
        told = threading.Thread(target=_say_lines, args=(words, command.stderr))
        if stderr is not None:
            told.start()
        while True:
            try:
                code = command.wait()
                break
            except KeyboardInterrupt:  # it has reached the command too
                continue
        if stderr is not None:
            told.join()
        return code


def json_of(words: Words, arguments: Sequence[str]) -> Any:
    """Return what `mst … --json` prints; None where it prints nothing.

    What it says beside that, and its errors, appear in this terminal, in the menu's language where
    they are known in it.
    """
    command = subprocess.Popen(
        [sys.executable, "-m", "mst", *arguments, "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert command.stdout is not None
    with command:
        told = threading.Thread(target=_say_lines, args=(words, command.stderr))
        told.start()
        try:
            text = command.stdout.read()
        except KeyboardInterrupt:  # it has reached the command too
            text = ""
        told.join()
    try:
        return json.loads(text)
    except ValueError:
        return None


def _say_lines(words: Words, lines: IO[str]) -> None:
    from mst.menu.screen import say

    for each in lines:
        say(translated_lines(each.rstrip("\n"), words.language))
