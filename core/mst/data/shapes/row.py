"""One record of a file of known shape, as a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mst.data.columns import Columns
from mst.data.refusals import Place, refuse
from mst.data.rows import Message, Row
from mst.data.shapes.content import refuse_media
from mst.data.shapes.pairs import (
    answered,
    asked,
    label,
    optional_name,
    plain_text,
    tools_of,
    with_reasoning,
)
from mst.data.shapes.pictures import with_images
from mst.data.shapes.preference import preference
from mst.data.shapes.turns import Tags, conversation, turns, with_system
from mst.data.shapes.values import needed, optional_text

# They change what is learned; dropping them would train on something else than the file says.
_UNSUPPORTED = ("tool_calls", "function_call", "weight")


def make_row(place: Place, columns: Columns, fields: Mapping[str, Any], tags: Tags) -> Row:
    """Return a record's row.

    Args:
        place: of the record.
        columns: what its file's columns mean.
        fields: of the record.
        tags: names within lists of turns.

    Raises:
        RowError: it has another shape, or nothing to learn from.
    """
    images = columns.optional.get("images", ())
    _refuse_unsupported(place, fields, images)
    file, number = place.file, place.row
    if columns.shape == "text":
        return Row((), file, number, text=plain_text(place, fields, columns.needed["text"]))
    tools = tools_of(place, columns, fields)
    if columns.shape == "preference":
        better, worse = preference(place, columns, fields, tags)
        if any(turn.parts for turn in (*better, *worse)):
            refuse(
                place,
                "a preference has an image, and preferences are learnt from text alone",
                "Remove the row.",
            )
        return Row(better, file, number, tools, rejected=worse)
    messages = conversation(place, _messages(place, columns, fields, tags))
    name = optional_name(place, columns, fields, "images")
    messages = with_images(place, name, fields.get(name) if name else None, messages)
    desirable = None
    if "label" in columns.needed:
        desirable = label(place, fields, columns.needed["label"])
        if messages[-1].role != "assistant":
            refuse(place, "what a label judges must end with an assistant turn", "Mend the row.")
    return Row(messages, file, number, tools, desirable=desirable)


def _messages(
    place: Place, columns: Columns, fields: Mapping[str, Any], tags: Tags
) -> tuple[Message, ...]:
    if "messages" in columns.needed:
        name = columns.needed["messages"]
        found = turns(place, name, needed(place, fields, name, list, str), tags)
        system = optional_name(place, columns, fields, "system")
        if system is not None:
            found = with_system(place, system, optional_text(place, fields, system), found)
    else:
        before = asked(place, columns, fields, columns.needed["prompt"], tags)
        found = (*before, *answered(place, fields, columns.needed["response"], tags))
    return with_reasoning(place, columns, fields, found)


def _refuse_unsupported(place: Place, fields: Mapping[str, Any], images: tuple[str, ...]) -> None:
    refuse_media(place, fields, images)
    for name in _UNSUPPORTED:
        if fields.get(name):
            refuse(
                place,
                f"field '{name}' changes what is learned, but mst reads it within a message alone",
                "Move it into the message that it is about, or remove it.",
            )
