"""Rows whose prompt and answer stand in columns of their own: Alpaca, query and response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mst.data.columns import Columns, optional_column
from mst.data.refusals import Place, json_type, refuse, shown_names
from mst.data.rows import Message
from mst.data.shapes.calls import tools
from mst.data.shapes.turns import Tags, turns, with_system
from mst.data.shapes.values import answer, needed, of_kind, optional_text, text

Fields = Mapping[str, Any]


def optional_name(place: Place, columns: Columns, fields: Fields, role: str) -> str | None:
    """Return the column that fills an optional role in this row, None where none does."""
    name, several = optional_column(fields, columns.optional.get(role, ()))
    if several:
        refuse(
            place,
            f"one field with the {role} is expected, found {shown_names(several)}",
            f"Say which with --columns {several[0]}={role}, or empty all but one.",
        )
    return name


def asked(
    place: Place, columns: Columns, fields: Fields, name: str, tags: Tags
) -> tuple[Message, ...]:
    """Return the conversation up to the answer: system, history and prompt.

    Args:
        place: of the row.
        columns: of the file.
        fields: of the row.
        name: the prompt's column; it holds text, or a list of turns.
        tags: how the file names things in lists of turns.
    """
    prompt = needed(place, fields, name, str, list)
    system_name = optional_name(place, columns, fields, "system")
    system = optional_text(place, fields, system_name)
    history_name = optional_name(place, columns, fields, "history")
    history = _history(place, history_name, fields)
    if isinstance(prompt, list):
        # TRL's conversational kind: turns that only lead to the answer carry no loss.
        told = turns(place, name, prompt, tags)
        before = [
            replace(turn, loss=False) if turn.role == "assistant" and turn.loss is None else turn
            for turn in told
        ]
        return with_system(place, system_name or "", system, [*history, *before])
    input_name = optional_name(place, columns, fields, "input")
    # instruction + "\n" + input, as ms-swift and LLaMA-Factory join them.
    parts = (text(place, name, prompt), optional_text(place, fields, input_name))
    question = Message("user", "\n".join(part for part in parts if part))
    return with_system(place, system_name or "", system, [*history, question])


def answered(place: Place, fields: Fields, name: str, tags: Tags) -> tuple[Message, ...]:
    """Return the turns of an answer's column: text, or turns that begin with the assistant's."""
    value = needed(place, fields, name, str, list, dict)
    if isinstance(value, str):
        return (Message("assistant", answer(place, name, value)),)
    found = turns(place, name, value, tags)
    if not found or found[0].role != "assistant":
        refuse(place, f"field '{name}' must begin with an assistant turn", "Mend the row.")
    return found


def with_reasoning(
    place: Place, columns: Columns, fields: Fields, messages: tuple[Message, ...]
) -> tuple[Message, ...]:
    """Return messages whose last answer has the thoughts that a column of their own holds."""
    name = optional_name(place, columns, fields, "reasoning")
    if name is None or not messages:
        return messages
    thoughts = optional_text(place, fields, name)
    if messages[-1].role != "assistant" or messages[-1].reasoning is not None:
        refuse(
            place,
            f"field '{name}' holds thoughts, but no answer at the conversation's end lacks them",
            "Move them into the turn that they belong to.",
        )
    return (*messages[:-1], replace(messages[-1], reasoning=thoughts))


def _history(place: Place, name: str | None, fields: Fields) -> list[Message]:
    # CSV has no lists: an empty cell is no history.
    value = fields.get(name) if name is not None else None
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        refuse(
            place,
            f"field '{name}' must be a list of [question, answer] pairs, found {json_type(value)}",
            "Use .jsonl for rows with a history.",
        )
    messages = []
    for number, pair in enumerate(value, start=1):
        part = Place(place.file, place.row, f"pair {number} of field '{name}'")
        if not isinstance(pair, list) or [type(each) for each in pair] != [str, str]:
            refuse(part, "two texts are expected, [question, answer]", "Mend the row.")
        messages.append(Message("user", text(part, "question", pair[0])))
        messages.append(Message("assistant", answer(part, "answer", pair[1])))
    return messages


def label(place: Place, fields: Fields, name: str) -> bool:
    """Return KTO's label: true, false, 1 or 0, in a CSV also as text."""
    value = fields.get(name)
    told = value.strip().lower() if isinstance(value, str) else value
    if isinstance(told, (bool, int, str)) and told in _LABELS:
        return _LABELS[told]
    found = "other text" if isinstance(value, str) else json_type(value)
    refuse(
        place,
        f"field '{name}' must be true or false, whether the answer is desirable, found {found}",
        "Mend it. Is it no such label? Then rename the column.",
    )


# 1 and 0 equal True and False.
_LABELS: Mapping[bool | int | str, bool] = {
    True: True, False: False, "true": True, "false": False, "1": True, "0": False,
}  # fmt: skip


def tools_of(place: Place, columns: Columns, fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """Return the tools that a row's column describes."""
    name = optional_name(place, columns, fields, "tools")
    return tools(place, name, fields[name]) if name is not None else ()


def plain_text(place: Place, fields: Fields, name: str) -> str:
    """Return a row's plain text, which may not be empty."""
    value = text(place, name, of_kind(place, name, fields.get(name), str))
    if not value.strip():
        refuse(place, f"field '{name}' is the text to learn, but it is empty", "Remove the row.")
    return value
