"""Tool calls, tool results and tools, as OpenAI's API, ShareGPT and ms-swift write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mst.data.refusals import Place, json_type, refuse
from mst.data.rows import Message
from mst.data.shapes.values import of_kind, parsed_json, plain_json, text

ToolCall = Mapping[str, Any]


def tool_calls(place: Place, name: str, value: object) -> tuple[ToolCall, ...]:
    """Return calls as `Message.tool_calls` has them.

    Args:
        place: of the message.
        name: its field.
        value: a call or a list of them, or JSON text of either. A call is {"name", "arguments"},
            bare or under "function"; its arguments are an object, or JSON text of one.
    """
    if isinstance(value, str):
        value = parsed_json(place, name, value)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        refuse(place, f"field '{name}' holds no call", "Remove it, or add the call.")
    return tuple(_call(place, name, call) for call in calls)


def _call(place: Place, name: str, call: object) -> ToolCall:
    if not isinstance(call, dict):
        refuse(
            place,
            f"field '{name}' must be a list of calls, each an object, found {json_type(call)}",
            "Mend the row.",
        )
    function = call.get("function", call)
    function = of_kind(place, "function", function, dict)
    called = text(place, "name", of_kind(place, "name", function.get("name"), str))
    if not called.strip():
        refuse(place, f"field '{name}' has a call without a 'name'", "Name the tool.")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = parsed_json(place, "arguments", arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else of_kind(place, "arguments", arguments, dict)
    plain_json(place, "arguments", arguments)
    made = {"type": "function", "function": {"name": called, "arguments": arguments}}
    identity = call.get("id")
    if identity is None:
        return made
    return {"id": text(place, "id", of_kind(place, "id", identity, str)), **made}


def tools(place: Place, name: str, value: object) -> tuple[Mapping[str, Any], ...]:
    """Return the schemas of a row's tools: a list of objects, or JSON text of one."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = parsed_json(place, name, value)
    listed = of_kind(place, name, value, list)
    for each in listed:
        plain_json(place, name, of_kind(place, name, each, dict))
    return tuple(listed)


def check_results(place: Place, messages: Sequence[Message]) -> None:
    """Raise RowError where a tool's result answers no call that was made before it."""
    pending: list[str] = []
    later = {str(call["id"]) for each in messages for call in each.tool_calls if "id" in call}
    previous = ""
    for number, message in enumerate(messages, start=1):
        part = Place(place.file, place.row, f"message {number}")
        if message.role == "assistant":
            pending = [str(call["id"]) for call in message.tool_calls if "id" in call]
            if len(set(pending)) < len(pending):
                refuse(part, "two calls of field 'tool_calls' have one 'id'", "Tell them apart.")
        if message.role == "tool":
            if previous not in ("assistant", "tool"):
                refuse(
                    part,
                    "a tool's result must follow the assistant's call",
                    "Add the call, or remove the result.",
                )
            answered = message.tool_call_id
            if answered is not None and later and answered not in pending:
                made = "one of another turn" if answered in later else "none"
                refuse(
                    part,
                    "field 'tool_call_id' must be that of a call in the assistant's turn before it "
                    f"that has no result yet, found {made}",
                    "Put the result behind its call.",
                )
            if answered in pending:
                pending.remove(answered)
        previous = message.role
