"""Every text of a row at any depth, keys included: counted, or replaced in a copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mst.seal.personal_data import names
from mst.seal.personal_data.patterns import find

# Fewer digits prove nothing: the shortest number that is found has 8.
_SMALLEST = 10_000_000
# A text whose value was replaced may hold another beside it; more rounds than this never happen.
_ROUNDS = 8


def count(row: Mapping[str, Any], keys: bool = True) -> Counter[str]:
    """Return how often each kind of `mst.seal.personal_data.patterns.KINDS` stands in a row.

    Args:
        row: a record's fields.
        keys: their names count too; those of a table stand in the file once, not in each row.
    """
    found: list[str] = []
    for key, value in row.items():
        if keys:
            found += _of_key(str(key))
        _collect(value, names.is_field(str(key), row.keys()), found)
    return Counter(found)


def _collect(value: Any, named: bool, found: list[str]) -> None:
    """Add the kinds in a value to `found`; `named` when it stands in a field of names."""
    if isinstance(value, str):
        if named and names.is_name(value):
            found.append("name")
        elif len(value) > 5:
            found += [each.kind for each in find(value)]
    elif isinstance(value, dict):
        for key, inner in value.items():
            found += _of_key(str(key))
            _collect(inner, names.is_field(str(key), value.keys()), found)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _collect(each, named, found)
    elif type(value) is int and value >= _SMALLEST:
        found += [each.kind for each in find(str(value))]


@lru_cache(maxsize=4096)
def _of_key(key: str) -> tuple[str, ...]:
    """Return the kinds in a key; a data set has few keys, so each is looked at once."""
    return tuple(each.kind for each in find(key)) if len(key) > 5 else ()


def masked(value: Any, named: bool = False) -> Any:
    """Return a value with placeholders, such as [ID_CARD], where personal data stood.

    Args:
        value: a row, or a part of one.
        named: it stands in a field of names.

    Returns:
        Of the same types at each place: a number that is personal data becomes 0.
    """
    if isinstance(value, str):
        return "[NAME]" if named and names.is_name(value) else masked_text(value)
    if isinstance(value, Mapping):
        keys = masked_keys(list(map(str, value)))
        beside = value.keys()
        return {
            new: masked(inner, names.is_field(str(key), beside))
            for new, (key, inner) in zip(keys, value.items(), strict=True)
        }
    if isinstance(value, (list, tuple)):
        return [masked(each, named) for each in value]
    if type(value) is int and value >= _SMALLEST and find(str(value)):
        return 0
    return value


def masked_text(text: str) -> str:
    """Return a text with a placeholder for each value in it."""
    for _ in range(_ROUNDS):
        found = find(text)
        if not found:
            break
        parts, done = [], 0
        for each in found:
            parts += [text[done : each.start], f"[{each.kind.upper()}]"]
            done = each.end
        text = "".join((*parts, text[done:]))
    return text


def masked_keys(keys: list[str]) -> list[str]:
    """Return names of fields without personal data, still different from each other."""
    taken: set[str] = {key for key in keys if not _of_key(key)}
    new = []
    for key in keys:
        name = plain = masked_text(key) if _of_key(key) else key
        number = 1
        while plain != key and name in taken:
            number += 1
            name = f"{plain} {number}"
        taken.add(name)
        new.append(name)
    return new
