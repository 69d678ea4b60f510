"""How an option is declared: a dataclass field that knows its help, its values and its names."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    group: str,
    choices: tuple[str, ...] = (),
    or_count: bool = False,
    aliases: tuple[str, ...] = (),
    metavar: str = "",
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a dataclass field that carries what a flag, a YAML key and the docs need.

    Args:
        default: value when neither YAML nor flag names it; None means "the planner decides".
        help: one line, without the default.
        group: heading in `--help`.
        choices: accepted strings; empty accepts all.
        or_count: a whole number from 1 on is accepted beside them.
        aliases: names that ms-swift, LLaMA-Factory, axolotl or TRL use for the same thing.
        metavar: what the help shows for the value.
        at_least: smallest accepted number.
        above: number that the value must exceed.
        below: number that the value must stay under.
    """
    metadata = {
        "help": help,
        "group": group,
        "choices": choices,
        "or_count": or_count,
        "aliases": aliases,
        "metavar": metavar,
        "at_least": at_least,
        "above": above,
        "below": below,
    }
    return field(default=default, metadata=metadata)
