"""Replies in the page's language: sentences of mst in them, told by the names of their fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mst.translation import translated, translated_lines

# Fields that hold a sentence, or sentences; what a person has written stands in no field of these.
_SENTENCES = frozenset(
    {
        "compared_with", "faults", "health", "help", "judged", "message", "not_checked", "notes",
        "problem", "problems", "reason", "warnings", "why",
    }
)  # fmt: skip
_PRINTED = "output"


def spoken(reply: Any, language: str) -> Any:
    """Return a reply with what is known in the language, "en" or "zh", said in it."""
    if language == "en":
        return reply
    if isinstance(reply, Mapping):
        return {name: _field(name, each, language) for name, each in reply.items()}
    return [spoken(each, language) for each in reply] if isinstance(reply, list) else reply


def _field(name: str, value: Any, language: str) -> Any:
    if name == _PRINTED:
        return translated_lines(value, language)
    return _sentences(value, language) if name in _SENTENCES else spoken(value, language)


def _sentences(value: Any, language: str) -> Any:
    if isinstance(value, str):
        return translated(value, language)
    if isinstance(value, Mapping):
        return {name: _sentences(each, language) for name, each in value.items()}
    return [_sentences(each, language) for each in value] if isinstance(value, list) else value
