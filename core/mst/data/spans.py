"""Which characters of a rendered conversation carry loss.

A chat template says nothing about who wrote what in its output, so it is found out by rendering.
The text before an answer is the conversation so far with the generation prompt, exactly what the
model sees when it is used; from there to the end-of-turn token is what it must learn to write.
Some templates render a turn differently when others follow, strip it, or move it. There, the same
conversation is rendered with the answer replaced by a marker, and what differs is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from mst.data.rows import Message
from mst.data.template import ChatTemplate, render
from mst.errors import DataError

Span = tuple[int, int]
TRAIN_ON = ("assistant", "last", "all")


def assistant_spans(
    template: ChatTemplate, messages: Sequence[Message], train_on: str
) -> tuple[str, tuple[Span, ...]]:
    """Render a conversation and say which characters of it carry loss.

    Args:
        template: the model's template.
        messages: the conversation.
        train_on: "assistant" for all assistant turns, "last" for the last of them, "all" for the
            whole text. A message's own `loss` overrides it for that turn.

    Returns:
        The text, and ascending (start, end) spans. A turn's span ends with its end-of-turn token:
        white space after it carries no loss, since the model has stopped by then.

    Raises:
        DataError: when the template refuses the conversation, writes no end-of-turn token after
            an answer, or hides where an answer stands. Does not say which row it was.
    """
    if train_on not in TRAIN_ON:
        raise DataError(f"--train-on '{train_on}' is not one of {', '.join(TRAIN_ON)}. Pass one.")
    text = render(template, messages)
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if train_on == "all":
        # Every turn is looked at, because a model that never reads an end of turn never stops.
        spans = {index: _turn_span(template, messages, index, text) for index in turns}
        return text, _without(len(text), [spans[i] for i in turns if messages[i].loss is False])
    default = turns if train_on == "assistant" else turns[-1:]
    trained = [i for i in turns if messages[i].loss or (messages[i].loss is None and i in default)]
    return text, tuple(_turn_span(template, messages, index, text) for index in trained)


def _without(length: int, holes: Sequence[Span]) -> tuple[Span, ...]:
    edges = [0, *(edge for hole in holes for edge in hole), length]
    spans = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, end) for start, end in spans if start < end)


def _turn_span(template: ChatTemplate, messages: Sequence[Message], index: int, text: str) -> Span:
    start = _prompt_end(template, messages[:index], text)
    if start is not None:
        for content in (messages[index].content, messages[index].content.strip()):
            if text.startswith(content, start):
                end = _stop_end(template, text, start + len(content))
                if end is not None:
                    return start, end
    found = _difference(template, messages, index, text)
    if found is None or (start is None and found[0] is None):
        raise DataError(
            f"message {index + 1} is an answer to learn, but where the chat template in "
            f"{template.origin} writes it cannot be proved. Pass --train-on last, or a --template "
            "that writes each turn unchanged."
        )
    begin, content_end = found
    end = _stop_end(template, text, content_end)
    if end is None:
        raise DataError(
            f"message {index + 1} is an answer to learn, but the chat template in "
            f"{template.origin} writes no end-of-turn token after it (looked for "
            f"{', '.join(template.stop_tokens) or 'none: the model names no eos_token'}), so the "
            "model would never stop. Pass a --template that does."
        )
    first = start if start is not None else begin
    assert first is not None
    return min(first, content_end), end


def _prompt_end(template: ChatTemplate, before: Sequence[Message], text: str) -> int | None:
    """Return the length of the prompt that `text` starts with, None when it does not."""
    try:
        prompt = render(template, before, add_generation_prompt=True)
    except DataError:
        # Many templates refuse a conversation without a user turn, or an empty one, though the
        # whole of it is fine.
        return None
    return len(prompt) if text.startswith(prompt) else None


def _difference(
    template: ChatTemplate, messages: Sequence[Message], index: int, text: str
) -> tuple[int | None, int] | None:
    """Find an answer by what changes when a marker stands in its place.

    Returns:
        Where the answer starts (None when not proved) and ends; None when not even that.
    """
    marker = "\ue000"  # a private-use character: no template gives it a meaning
    while any(marker in message.content for message in messages):
        marker += "\ue001"
    twin = [*messages]
    twin[index] = replace(messages[index], content=marker)
    rendered = render(template, twin)
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
    pairs = enumerate(zip(before, text, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), min(len(before), len(text)))
    turn = _turn_start(template, messages[:index], text)
    return (same if turn is not None and turn <= same <= end else None), end


def _turn_start(template: ChatTemplate, before: Sequence[Message], text: str) -> int | None:
    try:
        history = render(template, before)
    except DataError:
        return None
    return len(history) if text.startswith(history) else None


def _stop_end(template: ChatTemplate, text: str, position: int) -> int | None:
    """Return the end of the end-of-turn token that follows `position` after white space only."""
    if not template.stop_tokens:
        return None
    match = _stop_pattern(template.stop_tokens).match(text, position)
    return match.end() if match else None


@lru_cache(maxsize=8)
def _stop_pattern(stop_tokens: tuple[str, ...]) -> re.Pattern[str]:
    # Longest first, so that a token that starts with another one is taken whole.
    longest_first = sorted(stop_tokens, key=len, reverse=True)
    return re.compile(r"\s*(?:" + "|".join(map(re.escape, longest_first)) + ")")
