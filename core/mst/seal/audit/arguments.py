"""What of a command line may stand in a log: names of options, and values that are no text."""

from __future__ import annotations

import argparse
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mst.seal.audit.event import JsonValue

WITHHELD = "<withheld>"
# A value is logged when what the help calls it is in this list. So a new option for a text, such
# as a prompt or a passphrase, is withheld without anybody having to think of it.
_PLAIN = frozenset(
    {
        "base", "best", "bool", "cidr", "column", "date", "device", "dir", "file", "float", "host",
        "int", "k", "last", "max", "model", "n", "name", "number", "path", "role", "run", "size",
        "source", "stage", "step", "task", "tokens", "yaml",
    }
)  # fmt: skip
_NUMBERS = frozenset({"int", "float", "number", "n", "k", "tokens"})
_BARE = frozenset({"device"})


def given(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, JsonValue]:
    """Return the options that were given, by name; texts are withheld, and a YAML file hashed."""
    from mst.durable import sha256

    options: dict[str, JsonValue] = {}
    _gather(parser, args, options)
    found: dict[str, JsonValue] = {"options": options}
    config = getattr(args, "config", None)
    if isinstance(config, str) and Path(config).is_file():
        found["config_sha256"] = sha256(Path(config))
    return found


def _gather(
    parser: argparse.ArgumentParser, args: argparse.Namespace, options: dict[str, JsonValue]
) -> None:
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if isinstance(action, argparse._SubParsersAction):
            inner: Mapping[Any, argparse.ArgumentParser] = action.choices
            if value in inner:
                options[action.dest] = value
                _gather(inner[value], args, options)
        elif action.dest not in options and value is not None and value != action.default:
            name = action.dest.replace("_", "-")
            options[name if action.option_strings else action.dest] = shown(action, value)


def given_fields(values: Mapping[str, Any]) -> dict[str, JsonValue]:
    """Return the options of a training request, given from Python, as they may stand in a log."""
    from mst.request import fields

    known = {name: each.metadata for name, each in fields().items()}
    return {
        name: _shown(value, known[name]["choices"] or None, known[name]["metavar"], name)
        for name, value in values.items()
    }


def shown(action: argparse.Action, value: Any) -> JsonValue:
    """Return an option's value as it may stand in a log."""
    metavar = action.metavar or ""
    words = metavar if isinstance(metavar, str) else "|".join(metavar)
    choices = None if action.choices is None else tuple(action.choices)
    return _shown(value, choices, words, action.dest)


def _shown(value: Any, choices: Container[Any] | None, metavar: str, name: str) -> JsonValue:
    if isinstance(value, (list, tuple)):
        return [_shown(each, choices, metavar, name) for each in value]
    if isinstance(value, (bool, int, float)):
        return value
    if "N" in metavar.split("|") and re.fullmatch(r"[0-9]{1,9}", str(value)):
        return str(value)
    if choices is not None:
        return str(value) if value in choices else WITHHELD
    words = {each.lower() for each in re.split(r"[^A-Za-z]+", metavar) if each}
    if words and words <= _NUMBERS:
        return str(value) if re.fullmatch(r"[-+0-9.eE_]{1,40}", str(value)) else WITHHELD
    if (words and words <= _PLAIN) or name in _BARE:
        return str(value)
    # What the help lists, as of an option "auto|on|off".
    return str(value) if str(value) in metavar.split("|") else WITHHELD
