"""What a row gives and a chat template doesn't write.

Templates pass over what they don't know. A model that never sees its tools, or learns an empty
turn in place of a call, is trained on another conversation than the row's, and nobody is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mst.data.rows import Message
from mst.data.template import ChatTemplate, render
from mst.errors import DataError

Tools = Sequence[Mapping[str, Any]]


def refuse_omissions(
    template: ChatTemplate, messages: Sequence[Message], text: str, tools: Tools
) -> None:
    """Raise DataError when tools, a call, a tool's result or all reasoning are left out.

    Each is changed or taken away in turn: what leaves the text as it was isn't written.

    Args:
        template: the model's template.
        messages: the conversation.
        text: the conversation, rendered.
        tools: what the conversation may call.
    """
    if tools and _same(template, messages, text, ()):
        raise _omitted(template, "the row's tools", "describe them in a system turn")
    for index, message in enumerate(messages):
        where = f"message {index + 1}"
        for call in range(len(message.tool_calls)):
            rest = (*message.tool_calls[:call], *message.tool_calls[call + 1 :])
            twin = _with(messages, index, replace(message, tool_calls=rest))
            if _same(template, twin, text, tools):
                raise _omitted(template, f"call {call + 1} of {where}", "write it as the content")
        if message.role == "tool":
            twin = _with(messages, index, replace(message, content=message.content + "\ue000"))
            if _same(template, twin, text, tools):
                raise _omitted(template, f"the tool's result in {where}", "make it a user turn")
    if any(message.reasoning for message in messages):
        twin = [replace(message, reasoning=None) for message in messages]
        # Many leave out what was thought before the last question; that is how they are used.
        if _same(template, twin, text, tools) and not _writes_reasoning(template):
            raise _omitted(template, "the reasoning", "put it into the content")


def _with(messages: Sequence[Message], index: int, message: Message) -> list[Message]:
    return [*messages[:index], message, *messages[index + 1 :]]


def _same(template: ChatTemplate, twin: Sequence[Message], text: str, tools: Tools) -> bool:
    try:
        return render(template, twin, tools=tools) == text
    except DataError:
        # What a template misses, it has read.
        return False


def _writes_reasoning(template: ChatTemplate) -> bool:
    asked, answer = Message("user", "q"), Message("assistant", "a")
    try:
        without = render(template, (asked, answer))
    except DataError:
        return True  # can't be told
    return not _same(template, (asked, replace(answer, reasoning="r")), without, ())


def _omitted(template: ChatTemplate, what: str, way_out: str) -> DataError:
    return DataError(
        f"the chat template in {template.origin} leaves out {what}, so the model would learn "
        f"another conversation. Pass a --template that writes it, or {way_out}."
    )
