"""Lists of turns: OpenAI's messages, ShareGPT's two kinds, and ms-swift's roles for tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mst.data.refusals import Place, json_type, refuse
from mst.data.rows import Message
from mst.data.shapes.calls import check_results, tool_calls
from mst.data.shapes.content import Parts, content, refuse_media
from mst.data.shapes.values import answer, needed, of_kind, parsed_json, text

ROLES = ("system", "user", "assistant", "tool")
_CALL = "call"
# ms-swift's roles, and OpenAI's newer name of the system turn.
_MESSAGE_ROLES = {each: each for each in ROLES} | {
    "developer": "system",
    "tool_call": _CALL,
    "tool_response": "tool",
}
_SHAREGPT_ROLES = _MESSAGE_ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": _CALL,
}
# Other tools' names for a role, so that the error can say which one is meant.
_FOREIGN_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
# float32 holds it, and no one weighs a turn so much on purpose.
_MAX_WEIGHT = 1e6
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Tags:
    """Names that a file gives to a turn's role, its text, and the roles; "" for the usual ones.

    They are those of LLaMA-Factory's dataset_info.json.
    """

    role: str = ""
    content: str = ""
    roles: tuple[tuple[str, str], ...] = ()


USUAL = Tags()


def turns(place: Place, name: str, items: object, tags: Tags = USUAL) -> tuple[Message, ...]:
    """Return the messages of a list of turns, unchecked as a whole.

    Args:
        place: of the row.
        name: the field that holds them.
        items: {role, content} or {from, value} objects, or {human, assistant} pairs.
        tags: how the file names things.
    """
    if isinstance(items, str) and items.lstrip().startswith("["):  # a CSV's cell
        items = parsed_json(place, name, items)
    if isinstance(items, dict):  # ShareGPT's preferences hold one turn
        items = [items]
    messages: list[Message] = []
    for number, item in enumerate(of_kind(place, name, items, list), start=1):
        part = Place(place.file, place.row, f"{place.part} message {number}".lstrip())
        if not isinstance(item, dict):
            refuse(
                part,
                f"an object with 'role' and 'content' is expected, found {json_type(item)}",
                "Mend or remove the row.",
            )
        if "human" in item and "assistant" in item:
            messages += _pair(part, item)
            continue
        turn, is_call = _turn(part, item, tags)
        if is_call and messages and _goes_on(messages[-1], turn):
            last = messages.pop()
            turn = replace(last, tool_calls=last.tool_calls + turn.tool_calls)
        messages.append(turn)
    return tuple(messages)


def conversation(place: Place, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return messages that a model can learn from: each answer once, each result behind its call.

    Raises:
        RowError: no assistant's turn, two in a row, two system turns, or a stray tool result.
    """
    if not any(message.role == "assistant" for message in messages):
        refuse(
            place,
            "an assistant turn is needed to learn from, found none in 'messages'",
            "Add the answer, or remove the row.",
        )
    for number in range(1, len(messages)):
        if messages[number].role == messages[number - 1].role == "assistant":
            refuse(
                Place(place.file, place.row, f"message {number + 1}"),
                "two assistant turns follow each other",
                "Join them into one, or put the user's turn between them.",
            )
    if any(message.role == "tool" or message.tool_calls for message in messages):
        check_results(place, messages)
    return tuple(messages)


def with_system(
    place: Place, name: str, system: str, messages: Sequence[Message]
) -> tuple[Message, ...]:
    """Return messages behind the system turn that a column of its own holds."""
    if not system:
        return tuple(messages)
    if messages and messages[0].role == "system":
        refuse(
            place,
            f"field '{name}' holds a system turn, and the conversation begins with one",
            "Remove one of them.",
        )
    return (Message("system", system), *messages)


def _goes_on(previous: Message, turn: Message) -> bool:
    """Return whether a turn that only calls belongs to the assistant's turn before it."""
    same = (previous.loss, previous.weight) == (turn.loss, turn.weight)
    return previous.role == "assistant" and same


def _pair(place: Place, item: Mapping[str, Any]) -> list[Message]:
    human, parts = content(place, "human", item["human"])
    said = answer(place, "assistant", of_kind(place, "assistant", item["assistant"], str))
    return [Message("user", human, parts=parts), Message("assistant", said)]


def _turn(place: Place, item: Mapping[str, Any], tags: Tags) -> tuple[Message, bool]:
    """Return a turn, and whether its role says that it is a call alone."""
    refuse_media(place, item)
    sharegpt = "from" in item and "role" not in item
    role_name = tags.role or ("from" if sharegpt else "role")
    said = needed(place, item, role_name, str)
    role = _role(place, role_name, said, sharegpt, dict(tags.roles))
    content_name = tags.content or ("value" if "value" in item and sharegpt else "content")
    if role == _CALL:
        calls = tool_calls(place, content_name, needed(place, item, content_name, str, list, dict))
        loss, weight = _loss(place, item, "assistant"), _weight(place, item, "assistant")
        return Message("assistant", "", loss, weight, tool_calls=calls), True
    calls = _calls(place, item, role)
    written, parts = "", Parts()
    if not calls or item.get(content_name) is not None:
        written, parts = content(place, content_name, needed(place, item, content_name, str, list))
    if parts and role == "assistant":
        refuse(
            place,
            f"field '{content_name}' of an assistant turn has an image, but a model answers text",
            "Move it to the user's turn.",
        )
    if role == "assistant" and not calls:
        answer(place, content_name, written)
    message = Message(
        role,
        written,
        _loss(place, item, role),
        _weight(place, item, role),
        _reasoning(place, item, role),
        calls,
        _named(place, item, "tool_call_id") if role == "tool" else None,
        _named(place, item, "name"),
        parts,
    )
    return message, False


def _role(place: Place, name: str, said: str, sharegpt: bool, own: Mapping[str, str]) -> str:
    role = own.get(said) or (_SHAREGPT_ROLES if sharegpt else _MESSAGE_ROLES).get(said)
    if role is None:
        # The value is shown only when it is a known name: with swapped fields it is a row's text.
        lower = said.lower()
        meant = lower if lower in _MESSAGE_ROLES else _FOREIGN_ROLES.get(lower)
        hint = f"For '{said}' write '{meant}'." if meant else "Mend the row."
        accepted = ", ".join(("human", "gpt", *ROLES[:1]) if sharegpt else ROLES)
        refuse(place, f"field '{name}' must be one of {accepted}", hint)
    return role


def _calls(place: Place, item: Mapping[str, Any], role: str) -> tuple[Mapping[str, Any], ...]:
    for name in ("tool_calls", "function_call"):
        if item.get(name):
            if role != "assistant":
                refuse(
                    place,
                    f"field '{name}' is on a '{role}' turn, but only the assistant calls tools",
                    "Move it to the assistant's turn.",
                )
            return tool_calls(place, name, item[name])
    return ()


def _reasoning(place: Place, item: Mapping[str, Any], role: str) -> str | None:
    for name in _REASONING:
        value = item.get(name)
        if value is None or value == "":
            continue
        if role != "assistant":
            refuse(
                place,
                f"field '{name}' is on a '{role}' turn, but only assistants think",
                "Remove it.",
            )
        return text(place, name, of_kind(place, name, value, str))
    return None


def _named(place: Place, item: Mapping[str, Any], name: str) -> str | None:
    return text(place, name, of_kind(place, name, item[name], str)) if item.get(name) else None


def _loss(place: Place, item: Mapping[str, Any], role: str) -> bool | None:
    value = item.get("loss")
    if value is not None and not isinstance(value, bool):
        refuse(
            place,
            f"field 'loss' must be true, false or absent, found {json_type(value)}",
            "Mend it.",
        )
    if value and role != "assistant":
        _refuse_untrained(place, "loss", "true", role)
    return value


def _weight(place: Place, item: Mapping[str, Any], role: str) -> float | None:
    value = item.get("weight")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(
            place,
            f"field 'weight' must be a number or absent, found {json_type(value)}",
            "Mend it.",
        )
    # Compared before float(), which refuses an integer of 400 digits.
    if not 0 <= value <= _MAX_WEIGHT:
        refuse(place, f"field 'weight' must be between 0 and {_MAX_WEIGHT:g}", "Mend it.")
    if value and role != "assistant":
        _refuse_untrained(place, "weight", "above 0", role)
    return float(value)


def _refuse_untrained(place: Place, name: str, value: str, role: str) -> None:
    refuse(
        place,
        f"field '{name}' is {value} on a '{role}' turn, but only assistant turns are learned",
        "Remove it, or pass --train-on all.",
    )
