"""Rows with a better and a worse answer to the same prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mst.data.columns import Columns
from mst.data.refusals import Place, refuse
from mst.data.rows import Message
from mst.data.shapes.pairs import answered, asked, optional_name, with_reasoning
from mst.data.shapes.turns import Tags, conversation, turns, with_system
from mst.data.shapes.values import answer, needed, optional_text

Messages = tuple[Message, ...]


def preference(
    place: Place, columns: Columns, fields: Mapping[str, Any], tags: Tags
) -> tuple[Messages, Messages]:
    """Return the better and the worse conversation, both whole.

    Raises:
        RowError: the two begin differently, are the same, or end with no answer.
    """
    rejected = _side(place, fields, columns.needed["rejected"], tags)
    if "chosen" in columns.needed:
        chosen = _side(place, fields, columns.needed["chosen"], tags)
        answers = any(side[0].role == "assistant" for side in (chosen, rejected))
        context = (_context if answers else _system)(place, columns, fields, tags)
        better = _whole(place, columns.needed["chosen"], context, chosen)
    else:
        better = _better(place, columns, fields, tags)
        context = better[:-1]
    worse = _whole(place, columns.needed["rejected"], context, rejected)
    better, worse = conversation(place, better), conversation(place, worse)
    _check(place, better, worse)
    return better, worse


def _better(place: Place, columns: Columns, fields: Mapping[str, Any], tags: Tags) -> Messages:
    """Return the conversation whose last answer is the better one."""
    if "messages" in columns.needed:
        name = columns.needed["messages"]
        found = _with_system(place, columns, fields, turns(place, name, fields.get(name), tags))
    else:
        before = asked(place, columns, fields, columns.needed["prompt"], tags)
        found = (*before, *answered(place, fields, columns.needed["response"], tags))
        found = with_reasoning(place, columns, fields, found)
    if not found or found[-1].role != "assistant":
        refuse(place, "the better conversation must end with an assistant turn", "Mend the row.")
    return found


def _context(place: Place, columns: Columns, fields: Mapping[str, Any], tags: Tags) -> Messages:
    """Return what stands before both answers, where a column of its own holds it."""
    name = optional_name(place, columns, fields, "prompt")
    if name is not None:
        return asked(place, columns, fields, name, tags)
    name = optional_name(place, columns, fields, "messages")
    if name is None:
        return _system(place, columns, fields, tags)
    return _with_system(place, columns, fields, turns(place, name, fields[name], tags))


def _system(place: Place, columns: Columns, fields: Mapping[str, Any], tags: Tags) -> Messages:
    return _with_system(place, columns, fields, ())


def _with_system(
    place: Place, columns: Columns, fields: Mapping[str, Any], messages: Messages
) -> Messages:
    name = optional_name(place, columns, fields, "system")
    return with_system(place, name or "", optional_text(place, fields, name), messages)


def _side(place: Place, fields: Mapping[str, Any], name: str, tags: Tags) -> Messages:
    """Return the turns of one column: an answer, or a whole conversation."""
    value = needed(place, fields, name, str, list, dict)
    if isinstance(value, str):
        return (Message("assistant", answer(place, name, value)),)
    found = turns(Place(place.file, place.row, f"field '{name}'"), name, value, tags)
    if not found:
        refuse(place, f"field '{name}' holds no turn", "Mend or remove the row.")
    return found


def _whole(place: Place, name: str, context: Messages, found: Messages) -> Messages:
    """Return one whole conversation."""
    if found[0].role == "assistant":
        if not any(turn.role == "user" for turn in context):
            refuse(
                place,
                f"field '{name}' is an answer, but the prompt before it is missing",
                "Add a 'prompt' field, or begin the list of turns with the user's.",
            )
        return (*context, *found)
    # A whole conversation: only a system turn of its own column is put before it.
    if found[0].role != "system" and context and context[0].role == "system":
        return (context[0], *found)
    return found


def _check(place: Place, better: Messages, worse: Messages) -> None:
    shared = 0
    for one, other in zip(better, worse, strict=False):
        if one != other:
            break
        shared += 1
    if better == worse:
        refuse(
            place,
            "the better and the worse answer are the same, which says nothing",
            "Remove the row.",
        )
    tails = better[shared:], worse[shared:]
    if not shared or any(not tail or tail[0].role != "assistant" for tail in tails):
        refuse(
            place,
            "the better and the worse conversation must begin with the same turns and differ "
            "from an assistant turn on",
            "Give both the same prompt.",
        )
    if any(tail[-1].role != "assistant" for tail in tails):
        refuse(place, "both conversations must end with an assistant turn", "Mend the row.")
