"""Which characters of a rendered conversation carry loss, and how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mst.data.omissions import refuse_omissions
from mst.data.rows import Message
from mst.data.template import ChatTemplate, render_marked
from mst.data.turns import turn_places
from mst.errors import DataError

TRAIN_ON = ("assistant", "last", "all")


class Span(NamedTuple):
    """Characters of a text that carry loss, and the factor of that loss."""

    start: int
    end: int
    weight: float = 1.0


def assistant_spans(
    template: ChatTemplate,
    messages: Sequence[Message],
    train_on: str,
    tools: Sequence[Mapping[str, Any]] = (),
    first: int = 0,
) -> tuple[str, tuple[Span, ...]]:
    """Render a conversation and say which characters of it carry loss.

    Args:
        template: the model's template.
        messages: the conversation.
        train_on: "assistant" for all assistant turns, "last" for the last of them, "all" for the
            whole text. A message's own `loss` overrides it for that turn, and its `weight` is the
            factor of that turn's loss; 0 is no loss.
        tools: JSON schemas of the tools that the conversation may call.
        first: turns before this one carry no loss, whatever they say.

    Returns:
        The text, and ascending spans. A turn's span ends with its end-of-turn token: white space
        after it carries no loss, since the model has stopped by then, unless the template's own
        `{% generation %}` block holds it.

    Raises:
        DataError: when the template refuses the conversation, writes no end-of-turn token after
            an answer, hides where an answer stands, or leaves out tools, calls, their results or
            reasoning; when another turn than an assistant's asks for loss. Does not say which row
            it was.
    """
    if train_on not in TRAIN_ON:
        raise DataError(f"--train-on '{train_on}' is not one of {', '.join(TRAIN_ON)}. Pass one.")
    weights = _weights(messages, train_on, first)
    text, blocks = render_marked(template, messages, tools=tools)
    refuse_omissions(template, messages, text, tools)
    # With "all" every turn is looked at: a model that never reads an end of turn never stops.
    trained = [index for index, weight in weights.items() if weight or train_on == "all"]
    places = turn_places(template, messages, trained, text, blocks, tools)
    if train_on == "all":
        trained = [index for index in trained if weights[index] != 1]
    spans = [Span(*place, weights[index]) for index in trained for place in places[index]]
    return text, tuple(spans) if train_on != "all" else _around(len(text), spans)


def _weights(messages: Sequence[Message], train_on: str, first: int) -> dict[int, float]:
    """Return the factor of loss of each assistant turn by its place, 0 for none."""
    found: dict[int, float] = {}
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    chosen = turns[-1:] if train_on == "last" else turns
    for index, message in enumerate(messages):
        weight = 1.0 if message.weight is None else message.weight
        if not math.isfinite(weight) or weight < 0:
            raise DataError(
                f"message {index + 1} has the weight {weight:g}, but a factor of loss is a number "
                "from 0 on. Mend 'weight', or leave it out for 1."
            )
        if message.role == "assistant":
            learned = index in chosen if message.loss is None else message.loss
            found[index] = weight if learned and index >= first else 0.0
        elif message.loss or message.weight:
            raise DataError(
                f"message {index + 1} is a turn of the {message.role} and asks for loss, but only "
                "an assistant's turn can be learnt. Remove its 'loss' and 'weight', or pass "
                "--train-on all to learn the whole text."
            )
    return found


def _around(length: int, own: Sequence[Span]) -> tuple[Span, ...]:
    """Return spans that cover a text with weight 1, but for the spans that have their own."""
    edges = [0, *(edge for span in own for edge in span[:2]), length]
    rest = [Span(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return tuple(sorted(span for span in (*rest, *own) if span.weight and span.start < span.end))
