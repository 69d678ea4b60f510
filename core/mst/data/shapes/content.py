"""A message's content: text, or a list of parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mst.data.refusals import Place, json_type, refuse
from mst.data.shapes.values import of_kind, text

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_REMOTE = ("http:", "https:", "ftp:", "data:", "s3:", "oss:")


def content(place: Place, name: str, value: object) -> str:
    """Return the text of a message's content."""
    if isinstance(value, list):
        return content_parts(place, name, value)
    return text(place, name, of_kind(place, name, value, str, list))


def content_parts(place: Place, name: str, parts: list[Any]) -> str:
    """Return the text of a content that is a list of {type, text}, in order, nothing between."""
    found = []
    for part in parts:
        if not isinstance(part, dict):
            refuse(
                place,
                f"field '{name}' must be text or a list of {{type, text}}, found {json_type(part)} "
                "in the list",
                "Mend the row.",
            )
        kind = part.get("type", "text")
        if kind != "text":
            _refuse_part(place, name, kind, part)
        found.append(text(place, name, of_kind(place, "text", part.get("text"), str)))
    return "".join(found)


def refuse_media(place: Place, fields: Mapping[str, Any]) -> None:
    """Raise RowError for a row that brings images, video or sound beside its text."""
    for name in _MEDIA:
        if fields.get(name):
            _refuse_medium(place, name, fields[name])


def _refuse_part(place: Place, name: str, kind: object, part: Mapping[str, Any]) -> None:
    if isinstance(kind, str) and kind.removesuffix("_url") in _MEDIA:
        _refuse_medium(place, f"{name}' of type '{kind}", part.get(kind, part))
    refuse(
        place,
        f"field '{name}' has a part whose 'type' is not 'text'",
        "Write it as text, or remove it.",
    )


def _refuse_medium(place: Place, name: str, value: Any) -> None:
    if _is_remote(value):
        refuse(
            place,
            f"field '{name}' names an address, and mst fetches nothing from anywhere",
            "Remove the row, or save the file beside the data and name its path.",
        )
    refuse(
        place,
        f"field '{name}' is no text, and mst trains on text alone",
        "Remove it together with what the text says about it, or remove the row.",
    )


def _is_remote(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_is_remote(each) for each in value.values() if isinstance(each, (str, dict)))
    if isinstance(value, list):
        return any(_is_remote(each) for each in value if isinstance(each, (str, dict)))
    return isinstance(value, str) and value.lstrip().lower().startswith(_REMOTE)
