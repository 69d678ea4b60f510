"""One run: what was measured, and what can be done with it."""

from __future__ import annotations

import os
from pathlib import Path

from mst import background, rundir
from mst.background import Work, run_of
from mst.errors import MstError
from mst.menu.asking import BACK
from mst.menu.outcome import figures, show_outcome
from mst.menu.reports import EVALUATION
from mst.menu.screen import heading, say, show_command
from mst.menu.serving import serve_and_ask
from mst.menu.session import Session, in_language, run_here
from mst.menu.watching import watch

_EVERY_STATE = ("figures", "pack")
# What reads the weights of a run, which may be encrypted.
_WITH_KEY = ("serve", "chat", "eval", "merge", "export", "resume")


def show_run(session: Session, run: Path) -> None:
    """Show a run until the person goes back."""
    words, chosen = session.words, ""
    while True:
        shown = os.path.relpath(run)
        heading(words("run.title", name=run.name))
        try:
            state = state_now(run)
        except (MstError, OSError) as error:
            say(words("run.gone", reason=words.said(str(error))))
            return
        say(words(f"run.state_{state}"))
        for line in figures(words, run):
            say(line)
        show_command(["runs", "show", shown])
        actions = _actions(run, state)
        if chosen == actions[0] == "watch":  # it was left, and goes on
            return
        choices = [(each, words(f"run.{each}")) for each in actions]
        chosen = session.choose(words("run.question"), choices, actions[0])
        if chosen == BACK:
            return
        _do(session, run, shown, chosen)


def state_now(run: Path) -> str:
    """Return the state of a run; one that goes on runs, though it only reads its data as yet.

    Raises:
        MstError: it is none, or damaged.
    """
    state = rundir.state_of(run)
    return state if state == "done" or _work_of(run) is None else "running"


def _actions(run: Path, state: str) -> list[str]:
    """Return what can be done with a run in this state, the likeliest first."""
    if state == "done":
        return ["serve", "chat", "eval", "merge", "export", *_EVERY_STATE]
    if state == "running":
        return ["watch", *_EVERY_STATE] if _work_of(run) is not None else list(_EVERY_STATE)
    return ["resume", *_EVERY_STATE]


def _work_of(run: Path) -> Work | None:
    """Return the work in the background that trains into this directory."""
    found = [
        each
        for each in background.works()
        if each.state == "running" and (path := run_of(each)) is not None
        and path.resolve() == run.resolve()
    ]  # fmt: skip
    return found[-1] if found else None


def _do(session: Session, run: Path, shown: str, action: str) -> None:
    key = _key_options(session, run) if action in _WITH_KEY else []
    if key is None:
        return
    if action == "serve":
        serve_and_ask(session, run, key)
    elif action == "watch":
        work = _work_of(run)
        if work is not None:
            show_outcome(session.words, watch(session, work))
    elif action == "resume":
        in_background(session, ["train", "--output-dir", shown, "--resume", *key])
    elif action == "export":
        _export(session, shown, key)
    elif action == "eval":
        # Written where the page and the screen of a run look for it; it holds no row.
        report = os.path.join(shown, EVALUATION)
        in_background(session, ["eval", shown, "--compare", "base", "--output", report, *key])
    elif action == "merge":
        in_background(session, ["merge", shown, *key])
    else:
        here = {"chat": ["chat", shown, *key], "figures": ["runs", "show", shown]}
        arguments = in_language(session.words, here.get(action, ["audit", "pack", shown]))
        show_command(arguments)
        run_here(arguments, session.words)


def _key_options(session: Session, run: Path) -> list[str] | None:
    """Return what names the key of an encrypted run, as the person says; None for Esc."""
    from mst.seal.keys.run_key import RUN_KEY

    if not (run / RUN_KEY).is_file():
        return []
    # That of the data is a guess: the run may be older, with another key.
    given = session.draft.key_file or ""
    file = session.asking.ask(session.words("run.key_file"), given, True)
    if file is None:
        return None
    return ["--key-file", file] if file else []


def _export(session: Session, shown: str, key: list[str]) -> None:
    """Ask for the format, and export."""
    from mst.registry import load

    words = session.words
    names = sorted(load().exports, key=lambda each: (each != "merged", each))
    known = [each for each in names if f"formats.{each}" in words.texts]
    longest = max(map(len, names), default=0)
    choices = [(each, f"{each:<{longest}}  {words(f'formats.{each}')}") for each in known]
    choices += [(each, each) for each in names if each not in known]
    heading(words("run.export_title"))
    show_command(["export", shown])
    chosen = session.choose(words("run.format"), choices)
    if chosen != BACK:
        in_background(session, ["export", shown, "--format", chosen, *key])


def in_background(session: Session, arguments: list[str]) -> None:
    """Start a work, watch it, and show its outcome."""
    try:
        work = background.start(arguments)
    except MstError as error:
        show_command(arguments)
        say(session.words.error(error))
        return
    work = watch(session, work)
    show_outcome(session.words, work)
