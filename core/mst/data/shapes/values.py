"""The values of a row's fields, checked where they are used."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

from mst.data.refusals import Place, json_type, refuse, shown_names

# Deeper than any tool's schema; Python's own parser gives up at about a thousand.
_MAX_DEPTH = 64
# Four million tokens: more than any model reads, and as much as a tokenizer takes in seconds.
_MAX_CHARACTERS = 16 << 20


def needed(place: Place, fields: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """Return a field that must be there, and of one of `kinds` (str, list, dict)."""
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5)
        found = f"nearest there: {shown_names(near)}" if near else f"found {shown_names(fields)}"
        refuse(
            place,
            f"field '{name}' is needed as in the first row, but is not there ({found})",
            "Add it, or remove the row. Rows of another shape belong in a file of their own.",
        )
    return of_kind(place, name, fields[name], *kinds)


def of_kind(place: Place, name: str, value: object, *kinds: type) -> Any:
    """Return a field's value when it is of one of `kinds`."""
    if not isinstance(value, kinds):
        words: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
        expected = " or ".join(words[kind] for kind in kinds)
        refuse(
            place, f"field '{name}' must be {expected}, found {json_type(value)}", "Mend the row."
        )
    return value


def text(place: Place, name: str, value: str) -> str:
    """Return text that a tokenizer takes."""
    if len(value) > _MAX_CHARACTERS:
        refuse(
            place,
            f"field '{name}' has more than the {_MAX_CHARACTERS >> 20} Mi characters that fit",
            "Split it.",
        )
    if "\0" in value:
        refuse(place, f"field '{name}' holds a NUL character", "Remove it.")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        # JSON can escape half of a pair; no tokenizer takes it, and its error would quote the text.
        refuse(
            place,
            f"field '{name}' holds half of a surrogate pair (\\ud800 to \\udfff), which is no text",
            "Remove it.",
        )
    return value


def answer(place: Place, name: str, value: str) -> str:
    """Return the text of an assistant's answer, which may not be empty."""
    if not value.strip():
        refuse(
            place,
            f"field '{name}' is the assistant's answer, but it is empty: there is nothing to learn",
            "Fill it in, or remove the row.",
        )
    return text(place, name, value)


def optional_text(place: Place, fields: Mapping[str, Any], name: str | None) -> str:
    """Return a text field, "" where it is null or not there."""
    if name is None or fields.get(name) is None:
        return ""
    return text(place, name, of_kind(place, name, fields[name], str))


def parsed_json(place: Place, name: str, value: str) -> Any:
    """Return what a field's text says as JSON."""
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")
    except RecursionError:
        problem = "nested too deeply"
    except ValueError:
        problem = "a number with too many digits"
    refuse(place, f"field '{name}' must be JSON text, but it is not: {problem}", "Mend the row.")


def plain_json(place: Place, name: str, value: Any) -> Any:
    """Return JSON that a template can write: not too deep, of finite numbers and real text."""
    todo = [(value, 1)]
    while todo:
        each, depth = todo.pop()
        if depth > _MAX_DEPTH:
            refuse(place, f"field '{name}' is nested deeper than {_MAX_DEPTH}", "Flatten it.")
        if isinstance(each, str):
            text(place, name, each)
        elif isinstance(each, dict):
            todo += [(inner, depth + 1) for inner in each.values()]
            todo += [(key, depth + 1) for key in each]
        elif isinstance(each, list):
            todo += [(inner, depth + 1) for inner in each]
        elif isinstance(each, float) and not math.isfinite(each):
            refuse(
                place, f"field '{name}' holds NaN or infinity, which is no JSON", "Mend the row."
            )
        elif not (each is None or isinstance(each, (bool, int, float))):
            refuse(
                place, f"field '{name}' holds {json_type(each)} that JSON lacks", "Mend the row."
            )
    return value
