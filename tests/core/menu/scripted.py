"""A menu whose person answers from a script."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mst.menu.asking import Asking, Choice
from mst.menu.draft import Draft
from mst.menu.session import Session
from mst.menu.words import words_of


def scripted(place: Path, draft: Draft | None, *answers: str, language: str = "en") -> Session:
    """Return a session of somebody who has chosen `draft`, and gives these answers."""
    left = iter(answers)

    def choose(question: str, choices: Sequence[Choice], default: str) -> str:
        answer = next(left) or default
        assert answer in [each.value for each in choices]
        return answer

    return Session(
        words=words_of(language),
        asking=Asking(choose, lambda question, given, is_path: next(left), animated=False),
        environ=os.environ,
        ascii=False,
        draft=draft or Draft(),
        draft_file=place / "menu.json",
    )
