"""Images that a column lists: put where the conversation says that they stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mst.data.images import LISTED, Image
from mst.data.refusals import Place, refuse
from mst.data.rows import Message
from mst.data.shapes.content import Parts, referred_image
from mst.data.shapes.values import parsed_json

# How LLaVA's data, ms-swift and LLaMA-Factory write an image's place into text.
MARK = "<image>"


def with_images(
    place: Place, name: str | None, value: object, messages: Sequence[Message]
) -> tuple[Message, ...]:
    """Return messages with the images of a row's column at their places.

    A place is `<image>` in the text of a turn that is no answer, or a part of type "image" that
    names no path. Where there is none, the images stand before the first user's text.

    Args:
        place: of the row.
        name: of the column; None where the row has none.
        value: its paths, or one.
        messages: the conversation.

    Raises:
        RowError: images and places differ in number, or an image can't be used.
    """
    if name is None:
        if any(part is LISTED for turn in messages for part in turn.parts):
            refuse(
                place,
                "a turn has an image that names no path, and no column lists the row's images",
                "Name its path in the turn, or add 'images'.",
            )
        return tuple(messages)
    items = _listed(place, name, value)
    images = [referred_image(place, name, each, n) for n, each in enumerate(items, start=1)]
    if any(isinstance(each, Image) and each.path for turn in messages for each in turn.parts):
        refuse(
            place,
            f"images are named both in a turn and in field '{name}'",
            "Name each in one of them.",
        )
    divided = [turn if turn.role == "assistant" else _divided(turn) for turn in messages]
    places = sum(part is LISTED for turn in divided for part in turn.parts)
    if not places:
        return _in_front(place, messages, images)
    if places != len(images):
        refuse(
            place,
            f"field '{name}' must list as many images as the turns have places ({MARK})",
            "Mend the row.",
            f"images: {len(images)}, places: {places}",
        )
    rest = iter(images)
    return tuple(_filled(turn, rest) for turn in divided)


def _listed(place: Place, name: str, value: object) -> list[object]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # a CSV's cell
        value = parsed_json(place, name, value)
    return value if isinstance(value, list) else [value]


def _divided(turn: Message) -> Message:
    """Return a turn whose text is cut at the marks."""
    parts: list[str | Image] = []
    for each in turn.parts or (turn.content,):
        if isinstance(each, Image):
            parts.append(each)
            continue
        first, *others = each.split(MARK)
        parts.append(first)
        for other in others:
            parts += [LISTED, other]
    return _of_parts(turn, tuple(part for part in parts if part != ""))


def _filled(turn: Message, images: Iterator[Image]) -> Message:
    return replace(
        turn, parts=tuple(next(images) if part is LISTED else part for part in turn.parts)
    )


def _in_front(
    place: Place, messages: Sequence[Message], images: Sequence[Image]
) -> tuple[Message, ...]:
    """Return messages with the images before the first user's text, as ms-swift puts them."""
    number = next((n for n, turn in enumerate(messages) if turn.role == "user"), None)
    if number is None:
        refuse(place, "images are shown by a user's turn, but there is none", "Add one.")
    turn = messages[number]
    shown = _of_parts(turn, (*images, turn.content) if turn.content else tuple(images))
    return (*messages[:number], shown, *messages[number + 1 :])


def _of_parts(turn: Message, parts: Parts) -> Message:
    said = "".join(part for part in parts if isinstance(part, str))
    has_images = any(isinstance(part, Image) for part in parts)
    return replace(turn, content=said, parts=parts if has_images else ())
