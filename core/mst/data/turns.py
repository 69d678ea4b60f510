"""Where an assistant's turn stands in a rendered conversation.

A chat template says nothing about who wrote what in its output, so it is found out by rendering.
The text before an answer is the conversation so far with the generation prompt, exactly what the
model sees when it is used; from there to the end-of-turn token is what it must learn to write.
Some templates render a turn differently when others follow, strip it, or move it. There, the same
conversation is rendered with the answer replaced by a marker, and what differs is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mst.data.marks import answer_of, blocks_of_turns, shared_length
from mst.data.rows import Message
from mst.data.special import TURN_ENDS
from mst.data.template import ChatTemplate, render
from mst.errors import DataError

Tools = Sequence[Mapping[str, Any]]
Place = tuple[int, int]


def turn_places(
    template: ChatTemplate,
    messages: Sequence[Message],
    turns: Iterable[int],
    text: str,
    blocks: Sequence[Place],
    tools: Tools = (),
) -> dict[int, list[Place]]:
    """Return the (start, end) in characters of assistant turns, with their end-of-turn tokens.

    Args:
        template: the model's template.
        messages: the conversation.
        turns: places of the assistant turns that are asked for.
        text: the conversation, rendered.
        blocks: where the template's `{% generation %}` blocks stand in it, if it has them.
        tools: what the conversation may call.

    Raises:
        DataError: no end-of-turn token follows an answer, or it isn't proved where one stands.
    """
    marked = blocks_of_turns(template, messages, text, blocks, tools) if blocks else None
    found = {}
    for index in turns:
        if marked is not None:
            places = _marked(template, index, text, marked[index])
        else:
            places = [_turn(template, messages, index, text, tools)]
        # Some templates keep no answer of earlier turns, or want another form of content.
        if answer_of(messages[index]) not in "".join(text[start:end] for start, end in places):
            raise _not_proved(template, index)
        found[index] = places
    return found


def _marked(template: ChatTemplate, index: int, text: str, blocks: list[Place]) -> list[Place]:
    *others, (start, end) = blocks
    if _last_stop(template, text, start, end) is not None:
        return blocks
    stop = _stop_end(template, text, end)
    if stop is None:
        raise _never_stops(template, index)
    return [*others, (start, stop)]


def _turn(
    template: ChatTemplate, messages: Sequence[Message], index: int, text: str, tools: Tools
) -> Place:
    message = messages[index]
    start = _prefix(template, messages[:index], text, tools, add_generation_prompt=True)
    if start is not None:
        if not message.tool_calls:
            for content in (message.content, message.content.strip()):
                if content and text.startswith(content, start):
                    end = _stop_end(template, text, start + len(content))
                    if end is not None:
                        return start, end
        last = index + 1 == len(messages)
        after = len(text) if last else _prefix(template, messages[: index + 1], text, tools)
        end = _last_stop(template, text, start, after) if after is not None else None
        if end is not None:
            return start, end
    found = _difference(template, messages, index, text, tools)
    if found is None or (start is None and found[0] is None):
        raise _not_proved(template, index)
    begin, content_end = found
    end = _stop_end(template, text, content_end)
    if end is None:
        raise _never_stops(template, index)
    first = start if start is not None else begin
    assert first is not None
    return min(first, content_end), end


def _not_proved(template: ChatTemplate, index: int) -> DataError:
    return DataError(
        f"message {index + 1} is an answer to learn, but where the chat template in "
        f"{template.origin} writes it cannot be proved. Pass --train-on last, or a --template "
        "that writes each turn unchanged."
    )


def _never_stops(template: ChatTemplate, index: int) -> DataError:
    unknown = [end for end in TURN_ENDS if end in template.source]
    unknown = [end for end in unknown if end not in template.stop_tokens]
    hint = f"; it writes {unknown[0]}, which is no token of this model" if unknown else ""
    return DataError(
        f"message {index + 1} is an answer to learn, but the chat template in "
        f"{template.origin} writes no end-of-turn token after it (looked for "
        f"{', '.join(template.stop_tokens) or 'none: the model names no eos_token'}{hint}), so the "
        "model would never stop. Pass a --template that does."
    )


def _prefix(
    template: ChatTemplate,
    before: Sequence[Message],
    text: str,
    tools: Tools,
    add_generation_prompt: bool = False,
) -> int | None:
    """Return the length of a rendered beginning that `text` starts with, None when it doesn't."""
    try:
        beginning = render(template, before, add_generation_prompt, tools)
    except DataError:
        # Many templates refuse a conversation without a user turn, or an empty one, though the
        # whole of it is fine.
        return None
    return len(beginning) if text.startswith(beginning) else None


def _difference(
    template: ChatTemplate, messages: Sequence[Message], index: int, text: str, tools: Tools
) -> tuple[int | None, int] | None:
    """Find a turn by what changes when a marker stands in its place.

    Returns:
        Where the turn starts (None when not proved) and ends; None when not even that.
    """
    marker = "\ue000"  # a private-use character: no template gives it a meaning
    while any(marker in message.content for message in messages):
        marker += "\ue001"
    twin = [*messages]
    twin[index] = Message("assistant", marker)
    rendered = render(template, twin, tools=tools)
    if rendered.count(marker) != 1:
        return None
    before, after = rendered.split(marker)
    end = len(text) - len(after)
    if not text.endswith(after):
        return None
    if text.startswith(before):
        return (len(before), end) if len(before) <= end else None
    # A template that sorts an answer's reasoning into a block of its own changes the text before
    # the marker too; that is harmless while it stays within this turn.
    same = shared_length(before, text)
    turn = _prefix(template, messages[:index], text, tools)
    return (same if turn is not None and turn <= same <= end else None), end


def _stop_end(template: ChatTemplate, text: str, position: int) -> int | None:
    """Return the end of the end-of-turn token that follows `position` after white space only."""
    if not template.stop_tokens:
        return None
    match = _stop_pattern(template.stop_tokens).match(text, position)
    return match.end() if match else None


def _last_stop(template: ChatTemplate, text: str, start: int, end: int) -> int | None:
    """Return the end of the end-of-turn token that ends text[start:end] but for white space."""
    body = text[start:end].rstrip()
    if any(stop and body.endswith(stop) for stop in template.stop_tokens):
        return start + len(body)
    return None


@lru_cache(maxsize=8)
def _stop_pattern(stop_tokens: tuple[str, ...]) -> re.Pattern[str]:
    # Longest first, so that a token that starts with another one is taken whole.
    longest_first = sorted(stop_tokens, key=len, reverse=True)
    return re.compile(r"\s*(?:" + "|".join(map(re.escape, longest_first)) + ")")
