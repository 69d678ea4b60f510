"""What the model is to learn, and how: the goal, and the options of LoRA with their defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mst.menu.asking import BACK
from mst.menu.draft import GOALS, arguments, goal_of, reachable
from mst.menu.screen import heading, padded, say, show_command
from mst.menu.session import Session

# What people who don't write commands may want to change.
SETTINGS = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "num_train_epochs",
    "learning_rate",
    "max_length",
    "val_size",
)
_USE = "use"


def choose_goal(session: Session) -> str:
    """Let the person choose the goal; returns `BACK`, or "next"."""
    words = session.words
    heading(words("goal.title"))
    show_command(["train", *arguments(session.draft)])
    while True:
        draft = session.draft
        choices = [
            (
                each,
                words(f"goal.{each}") + ("" if reachable(draft, each) else words("goal.lacking")),
            )
            for each in GOALS
        ]
        chosen = session.choose(words("goal.question"), choices, goal_of(draft))
        if chosen == BACK:
            return BACK
        if reachable(draft, chosen):
            session.keep(replace(draft, goal=chosen))
            return "next"
        say(words(f"goal.{chosen}_needs"))


def choose_settings(session: Session) -> str:
    """Let the person take or change LoRA's options; returns `BACK`, or "next"."""
    words = session.words
    heading(words("settings.title"))
    say(words("settings.means"))
    default = _USE
    while True:
        show_command(["train", *arguments(session.draft)])
        choices = [(_USE, words("settings.use"))]
        choices += [(each, _label(session, each)) for each in SETTINGS]
        chosen = session.choose(words("settings.question"), choices, default)
        if chosen == BACK:
            return BACK
        if chosen == _USE:
            return "next"
        _change(session, chosen)
        default = _USE


def _default(session: Session, name: str) -> Any:
    """Return an option's value where none is given; None leaves it to the planner."""
    from mst.demo import demo_defaults
    from mst.request import fields

    if not session.draft.dataset:  # whose held-out rows are a file of their own
        recipe = {**demo_defaults(), "val_size": None}
        if name in recipe:
            return recipe[name]
    return fields()[name].default


def _label(session: Session, name: str) -> str:
    shown = session.draft.options.get(name) or _shown_default(session, name)
    means = session.words(f"options.{name}")
    return f"{padded(name, 16)} {padded(shown, 6)} {means}"


def _change(session: Session, name: str) -> None:
    """Ask for an option's value; nothing takes the default, and a wrong one is explained."""
    from mst.cli.options import convert
    from mst.errors import UsageError

    words, options = session.words, dict(session.draft.options)
    say(f"{name}: " + words(f"options.{name}"))
    say(words("settings.default", value=_shown_default(session, name)))
    text = session.edited(f"{name} =", options.pop(name, ""), False)
    if text is None:
        return
    if text:
        try:
            convert(name, text, f"--{name.replace('_', '-')}")
        except UsageError as error:
            say(words.said(str(error)))
            return
        options[name] = text
    session.keep(replace(session.draft, options=options))


def _shown_default(session: Session, name: str) -> str:
    value = _default(session, name)
    return session.words("settings.auto") if value is None else f"{value:g}"
