"""The plan in plain words, with its time and memory; and the start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mst.background import run_of
from mst.menu.asking import BACK
from mst.menu.draft import arguments
from mst.menu.outcome import show_outcome
from mst.menu.run_screen import show_run
from mst.menu.screen import heading, say, show_command
from mst.menu.session import Session, json_of
from mst.menu.watching import watch
from mst.menu.words import duration_words
from mst.quantities import gib

_START, _QUICK, _WHY, _SETTINGS = "start", "quick", "why", "settings"


def plan_and_start(session: Session) -> str:
    """Show the plan, and start it if the person wants; returns `BACK`, or "home"."""
    words = session.words
    heading(words("plan.title"))
    asked = arguments(session.draft)
    show_command(["plan", *asked])
    say(words("plan.making"))
    found = json_of(words, ["plan", *asked])
    if found is not None:
        say_plan(session, found)
    session.asking.forget()
    while True:
        names = (_START, _QUICK, _WHY, _SETTINGS) if found is not None else (_SETTINGS,)
        choices = [(each, words(f"plan.{each}")) for each in names]
        question = words("plan.question" if found is not None else "plan.failed")
        chosen = session.choose(question, choices, names[0])
        if chosen in (BACK, _SETTINGS):
            return BACK
        if chosen == _WHY:
            _say_reasons(session, found["plan"])
            continue
        return _start(session, chosen == _QUICK)


def say_plan(session: Session, found: Any) -> None:
    """Say a plan in plain words."""
    words, plan = session.words, found["plan"]
    devices = ", ".join(dict.fromkeys(plan["torch_devices"]))
    say(words(f"plan.{plan['tuner']}", devices=devices, count=len(plan["torch_devices"])))
    say(
        words(
            "plan.rows",
            rows=plan["train_rows"],
            held_out=plan["val_rows"],
            steps=plan["total_steps"],
        )
    )
    free = plan["memory"]["available_bytes"]
    needed = gib(plan["peak_bytes"])
    say(
        words("plan.memory", needed=needed, free=gib(free))
        if free is not None
        else words("plan.memory_alone", needed=needed)
    )
    time = plan["time"]
    if time is None:
        say(words("plan.time_unknown"))
    else:
        seconds, factor = time["total_seconds"], time["uncertainty"]
        say(
            words(
                "plan.time",
                time=duration_words(words, seconds),
                low=duration_words(words, seconds / factor),
                high=duration_words(words, seconds * factor),
            )
        )
    for each in plan["warnings"]:
        say(words("plan.note", text=words.said(each)))


def _say_reasons(session: Session, plan: Any) -> None:
    for each in plan["reasons"]:
        say(f"{each['choice']} = {each['value']}: {session.words.said(each['why'])}")


def _start(session: Session, quick: bool) -> str:
    """Start the run in the background, watch it, and show what came of it."""
    from mst import background
    from mst.errors import MstError
    from mst.job import default_output_dir
    from mst.model.locate import locate

    words = session.words
    try:
        output = default_output_dir(locate(session.draft.model, (), session.environ))
        options = arguments(session.draft, quick)
        work = background.start(["train", *options, "--output-dir", str(output)])
    except MstError as error:
        say(session.words.error(error))
        return BACK
    work = watch(session, work)
    show_outcome(words, work)
    if quick and work.state == "done":
        say(words("plan.tried"))
    run = run_of(work)
    if work.state == "running" or run is None:
        return "home"
    if (run / "run.json").is_file():
        show_run(session, Path(os.path.relpath(run)))
        return "home"
    return BACK
