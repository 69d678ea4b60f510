"""Assistant turns by a template's own `{% generation %}` blocks, as transformers finds them.

What is in the blocks carries loss to the letter, white space after the end-of-turn token included,
so that the tokens are those of `apply_chat_template(return_assistant_tokens_mask=True)`. An
end-of-turn token that stands right behind a block is learnt with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mst.data.rows import Message
from mst.data.template import ChatTemplate, render
from mst.errors import DataError

Block = tuple[int, int]


def blocks_of_turns(
    template: ChatTemplate,
    messages: Sequence[Message],
    text: str,
    blocks: Sequence[Block],
    tools: Sequence[Mapping[str, Any]],
) -> dict[int, list[Block]] | None:
    """Return the generation blocks of each assistant turn, None when that isn't proved.

    Args:
        template: the model's template.
        messages: the conversation.
        text: the conversation, rendered.
        blocks: (start, end) of its generation blocks.
        tools: what the conversation may call.
    """
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if len(turns) == 1:
        return {turns[0]: list(blocks)}
    if len(turns) == len(blocks) and all(
        answer_of(messages[index]) in text[start:end]
        for index, (start, end) in zip(turns, blocks, strict=True)
    ):
        return {index: [block] for index, block in zip(turns, blocks, strict=True)}
    found: dict[int, list[Block]] = {}
    rest = list(blocks)
    for index in turns:
        end = len(text)
        if index != turns[-1]:
            try:
                beginning = render(template, messages[: index + 1], tools=tools)
            except DataError:
                return None
            end = shared_length(beginning, text)
        # A block that begins where the two texts part is of this turn: its beginning may depend
        # on what follows, and a header stands before the next turn.
        found[index] = [block for block in rest if block[0] <= end]
        rest = [block for block in rest if block[0] > end]
    return found if all(found.values()) else None


def answer_of(message: Message) -> str:
    """Return what of a message every template must write: its text after any thinking."""
    return message.content.split("</think>")[-1].strip()


def shared_length(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginnings."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
