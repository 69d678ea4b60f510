"""From a request to the token ids that the model reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mst.data.rows import Message
from mst.data.template import ChatTemplate, ConversationRefused, render
from mst.data.tokens import TextTokenizer
from mst.errors import ModelError
from mst.serve.http.refusals import wrong
from mst.serve.http.shapes import ChatMessage, ChatRequest


@dataclass(frozen=True)
class Reader:
    """What reads prompts for the model.

    Attributes:
        tokenizer: the model's.
        template: its chat template.
        context: most tokens of prompt and answer together.
    """

    tokenizer: TextTokenizer = field(repr=False)
    template: ChatTemplate = field(repr=False)
    context: int


def chat_ids(reader: Reader, request: ChatRequest) -> tuple[int, ...]:
    """Return the token ids of a conversation, up to where the model answers.

    Raises:
        Refusal: the template refuses it, or it is too long.
    """
    tools: list[dict[str, Any]] = []
    if request.tool_choice != "none":
        tools = [each.model_dump(exclude_none=True) for each in request.tools or ()]
    if tools and "tools" not in reader.template.source:
        raise wrong(
            "this model's chat template has no place for tools, so that the model would never hear"
            " of them. Serve another model, or leave tools out.",
            "tools",
        )
    messages = [_message(reader, each) for each in request.messages]
    try:
        text = render(reader.template, messages, add_generation_prompt=True, tools=tools)
    except ConversationRefused as error:
        roles = ", ".join(each.role for each in messages)
        raise wrong(
            f"the model's chat template refused this conversation ({roles}): {error.reason}. Send"
            " turns in the order that the model was trained with.",
            "messages",
        ) from None
    except ModelError:
        raise wrong(
            "the model's chat template takes too long for this conversation, or makes too much of"
            " it. Send a shorter one.",
            "messages",
        ) from None
    return fitting(reader, reader.tokenizer.encode(text).ids, "messages")


def _message(reader: Reader, message: ChatMessage) -> Message:
    role = message.role
    if role == "developer" and "developer" not in reader.template.source:
        # OpenAI's newer word for it; few templates know it.
        role = "system"
    return Message(
        role,
        message.text(),
        reasoning=message.reasoning_content,
        tool_calls=tuple(
            {
                "id": each.id,
                "type": "function",
                "function": {
                    "name": each.function.name,
                    "arguments": _arguments(each.function.arguments),
                },
            }
            for each in message.tool_calls or ()
        ),
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _arguments(text: str) -> dict[str, Any]:
    """Return a call's arguments as templates take them, and as rows of training have them."""
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise wrong(
            "the arguments of a call are the JSON text of an object; these are not.", "messages"
        )
    return found


def plain_ids(reader: Reader, prompt: str | Sequence[int], param: str) -> tuple[int, ...]:
    """Return the token ids of a plain text, as the model's tokenizer begins it, or given ids.

    Raises:
        Refusal: an id is none of the model's, or it is empty or too long.
    """
    if isinstance(prompt, str):
        return fitting(reader, reader.tokenizer.tokenizer.encode(prompt).ids, param)
    size = reader.tokenizer.vocab_size
    if not all(0 <= each < size for each in prompt):
        raise wrong(f"token ids are numbers from 0 to {size - 1} with this model.", param)
    return fitting(reader, prompt, param)


def fitting(reader: Reader, ids: Sequence[int], param: str) -> tuple[int, ...]:
    """Return ids that leave room for an answer.

    Raises:
        Refusal: there is no id, or they fill the model's context.
    """
    if not ids:
        raise wrong("the prompt has no token at all. Send a text.", param)
    if len(ids) >= reader.context:
        raise wrong(
            f"this model's maximum context length is {reader.context} tokens, prompt and answer"
            f" together, and the prompt has {len(ids)}. Send a shorter one.",
            param,
            "context_length_exceeded",
        )
    return tuple(ids)
