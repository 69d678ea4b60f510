"""A translation in the making: what was taken from their settings, what is written into ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mst.cli.options import convert
from mst.errors import UsageError
from mst.request import fields

# What leaving a setting out does to the tuned model: nothing; that depends on something which the
# file doesn't hold; or it comes out otherwise.
Effect = Literal["none", "check", "changes"]


@dataclass(frozen=True)
class Written:
    """One option of ours, and where it comes from.

    Attributes:
        name: the option.
        value: its value, as YAML holds it.
        source: their key, or "" where it is their default.
        note: what differs, if anything.
    """

    name: str
    value: Any
    source: str
    note: str = ""


@dataclass(frozen=True)
class Left:
    """One of their settings that has no option here, or only nearly one.

    Their value is never kept: it may be a token.
    """

    key: str
    reason: str
    effect: Effect


def truth(value: object) -> bool:
    """Return whether a setting is on, from YAML's booleans and from words of a command line."""
    return str(value).strip().lower() in ("true", "yes", "on", "1", "t", "y")


def number(value: object) -> float | None:
    """Return a setting as a finite number; None where it isn't one."""
    if isinstance(value, bool):
        return None
    try:
        found = float(str(value))
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def words(value: object) -> list[str]:
    """Return a setting that holds one or more names: a list, or text with commas."""
    items = value if isinstance(value, (list, tuple)) else str(value).split(",")
    return [str(each).strip() for each in items if str(each).strip()]


class Draft:
    """Their settings, each of which is taken once, and the options written so far."""

    def __init__(self, given: Mapping[str, Any], command: str | None, directory: Path) -> None:
        """Begin with everything untaken.

        Args:
            given: their keys, with underscores.
            command: the subcommand that the settings were given to, such as `sft`; None if unknown.
            directory: where the file lies.
        """
        self.given = given
        self.command = command
        self.directory = directory
        self.taken: set[str] = set()
        self.options: dict[str, Any] = {}
        self.written: list[Written] = []
        self.left: list[Left] = []
        self.undecided: set[str] = set()

    def take(self, *keys: str) -> Any:
        """Return the value of the first of these keys that has one; all are dealt with then."""
        self.taken.update(keys)
        found = [self.given.get(key) for key in keys]
        return next((each for each in found if each not in (None, "", [])), None)

    def spelt(self, *keys: str) -> str:
        """Return the first of these keys that has a value, to say where an option comes from."""
        return next((k for k in keys if self.given.get(k) not in (None, "", [])), keys[0])

    def keep(self, name: str, value: Any, source: str, note: str = "") -> bool:
        """Write an option; where mst doesn't take it, report their key and return False."""
        if name not in fields():
            self.drop(source, f"mst has no option {name}", "changes", name)
            return False
        try:
            converted = convert(name, value, source)
        except UsageError:
            choices = fields()[name].metadata["choices"]
            accepted = f"only {', '.join(choices)}" if choices else "no such value"
            self.drop(source, f"mst's {name} takes {accepted}", "changes", name)
            return False
        self.options[name] = list(converted) if isinstance(converted, tuple) else converted
        self.written.append(Written(name, self.options[name], source, note))
        return True

    def drop(self, key: str, reason: str, effect: Effect = "none", name: str = "") -> None:
        """Report a setting that isn't carried over; `name` is the option that it asked for.

        That option keeps mst's default then, and not the tool's: the file asks for neither.
        """
        self.left.append(Left(key, reason, effect))
        self.undecided.add(name)

    def path(self, text: str) -> Path:
        """Return a path of theirs: from here as they do, or else beside their file."""
        there = Path(text).expanduser()
        return there if there.exists() else self.directory / there
