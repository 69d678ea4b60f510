"""A translation as YAML, as a table for a person, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mst.foreign.draft import Effect, Left, Written
from mst.foreign.translate import Translation

_HEADINGS: dict[Effect, str] = {
    "changes": "not carried over; the tuned model will differ",
    "check": "to be checked by you",
    "none": "not needed",
}


def to_yaml(translation: Translation, title: str) -> str:
    """Return our options as the YAML that `mst plan` and `mst train` take."""
    import yaml

    body = yaml.safe_dump(dict(translation.options), sort_keys=False, allow_unicode=True)
    head = f"# Translated from {title}; see the report of `mst config import`.\n"
    needs = sum(each.effect != "none" for each in translation.left)
    if needs:
        head += f"# {needs} of its settings need a look.\n"
    return head + (body if translation.options else "")


def to_json(translation: Translation) -> dict[str, Any]:
    """Return everything that the table says, for programs."""
    return {
        "tool": translation.tool,
        "options": dict(translation.options),
        "translated": [asdict(each) for each in translation.translated],
        "defaults": [asdict(each) for each in translation.defaults],
        "dropped": [asdict(each) for each in translation.left],
        "unknown": [{"key": key, "hint": hint} for key, hint in translation.unknown],
    }


def lines(translation: Translation) -> list[str]:
    """Return the report: first what changes the result, last what says nothing about it."""
    found: list[str] = []
    for effect in ("changes", "check"):
        found += _left(translation.left, effect)
    if translation.unknown:
        found.append(f"unknown keys of {translation.tool}; nothing was made of them")
        found += [f"  {key}  {hint}".rstrip() for key, hint in translation.unknown]
    found += _written("translated", translation.translated)
    found += _written(
        f"not in the file: {translation.tool}'s default, written out", translation.defaults
    )
    found += _left(translation.left, "none")
    return found


def summary(translation: Translation) -> str:
    """Return one line of counts."""
    counts = {
        effect: sum(each.effect == effect for each in translation.left) for effect in _HEADINGS
    }
    return (
        f"{len(translation.translated)} translated, {len(translation.defaults)} defaults written"
        f" out, {counts['changes']} change the result, {counts['check']} to be checked,"
        f" {counts['none']} not needed, {len(translation.unknown)} unknown"
    )


def _written(heading: str, found: Sequence[Written]) -> list[str]:
    if not found:
        return []
    rows = [(each.source, f"{each.name}: {_shown(each.value)}", each.note) for each in found]
    if not any(theirs for theirs, _, _ in rows):
        rows = [(ours, "", note) for _, ours, note in rows]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    arrow = " → " if any(row[1] for row in rows) else ""
    return [
        heading,
        *(
            f"  {theirs:<{widths[0]}}{arrow}{ours:<{widths[1]}}  {note}".rstrip()
            for theirs, ours, note in rows
        ),
    ]


def _left(found: Sequence[Left], effect: Effect) -> list[str]:
    """Return settings with one effect, those with one reason in one line."""
    reasons: dict[str, list[str]] = {}
    for each in found:
        if each.effect == effect:
            keys = reasons.setdefault(each.reason, [])
            keys += [] if each.key in keys else [each.key]
    heading = [_HEADINGS[effect]] if reasons else []
    return heading + [f"  {', '.join(keys)}: {reason}" for reason, keys in reasons.items()]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
