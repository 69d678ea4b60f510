"""Which data: the embedded rows or files of one's own, told by counts and never by contents."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mst.menu.asking import BACK
from mst.menu.draft import arguments
from mst.menu.screen import heading, say, show_command
from mst.menu.session import Session, json_of

_DEMO, _OWN, _KEPT = "demo", "own", "kept"


def choose_data(session: Session) -> str:
    """Let the person choose the data; returns `BACK`, or "next"."""
    words = session.words
    heading(words("data.title"))
    show_command(["train", *arguments(session.draft)])
    while True:
        choices = [(_DEMO, words("data.demo")), (_OWN, words("data.own"))]
        draft = session.draft
        if draft.dataset:
            kept = words("data.kept", path=draft.dataset[0], rows=draft.rows)
            choices.insert(0, (_KEPT, kept))
        default = _KEPT if draft.dataset else _DEMO
        chosen = session.choose(words("data.question"), choices, default)
        if chosen == BACK:
            return BACK
        if chosen == _DEMO:
            say(words("data.demo_counts"))
            demo = replace(draft, dataset=(), shape="", rows=0, answers=None, key_file=None)
            session.keep(replace(demo, options=_without_skipping(draft.options)))
            return "next"
        if chosen == _KEPT or _take_own(session):
            return "next"


def _take_own(session: Session) -> bool:
    """Ask for a file, look at all of its rows, and keep it where it can be used."""
    words = session.words
    say(words("data.kinds"))
    path = session.asking.ask(words("data.path"), "", True)
    if not path:
        return False
    path = os.path.expanduser(path)  # which lets ~ of nobody be
    key_file = None
    if path.endswith(".mst"):
        asked = session.edited(words("data.key_file"), session.draft.key_file or "", True)
        if asked is None:
            return False
        key_file = os.path.abspath(os.path.expanduser(asked)) if asked else None
    check = ["data", "check", path]
    if key_file:
        check += ["--key-file", key_file]
    if session.draft.model is not None:
        check += ["--model", session.draft.model]
    show_command(check)
    say(words("data.looking"))
    found = json_of(words, check)
    if found is None:
        say(words("data.unusable"))
        return False
    files = found["files"]
    for each in files:
        _say_file(session, each)
    lengths = found.get("lengths")
    if lengths:
        say(words("data.lengths", median=lengths["median"], longest=lengths["longest"]))
    usable = [each for each in files if not each["problem"]]
    rows = sum(each["rows"] for each in usable)
    if not rows or len(usable) < len(files):
        say(words("data.unusable"))
        return False
    if any(each["refused"] for each in files) and not session.confirmed(words("data.skip")):
        return False
    _keep(session, path, key_file, found, rows)
    return True


def _without_skipping(options: Mapping[str, str]) -> dict[str, str]:
    """Return the options without what was answered about the rows of other data."""
    return {name: value for name, value in options.items() if name != "on_bad_row"}


def _keep(session: Session, path: str, key_file: str | None, found: Any, rows: int) -> None:
    options = _without_skipping(session.draft.options)
    if any(each["refused"] for each in found["files"]):
        options["on_bad_row"] = "skip"
    session.keep(
        replace(
            session.draft,
            dataset=(str(Path(path).absolute()),),
            shape=found["files"][0]["shape"],
            rows=rows,
            answers=found["answers"],
            goal="",
            options=options,
            key_file=key_file,
        )
    )


def _say_file(session: Session, file: Any) -> None:
    """Say what a file holds, in counts."""
    words = session.words
    if file["problem"]:
        say(words("data.refused_whole", reason=words.said(file["problem"])))
        return
    say(words("data.file", rows=file["rows"], kind=file["kind"], shape=_shape(session, file)))
    if file["duplicates"]:
        say(words("data.duplicates", count=file["duplicates"]))
    for each in file["refused"]:
        say(words("data.refused", count=each["rows"], reason=words.said(each["reason"])))


def _shape(session: Session, file: Any) -> str:
    key = f"shapes.{file['shape']}"
    return session.words(key) if key in session.words.texts else str(file["shape"])
