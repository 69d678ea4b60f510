"""A message's content: text, or a list of parts that are text or images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mst.data.images import LISTED, Image, find_image
from mst.data.refusals import Place, json_type, refuse
from mst.data.shapes.values import of_kind, text

Parts = tuple[str | Image, ...]
IMAGE_FIELDS = ("image", "images")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_REMOTE = ("http:", "https:", "ftp:", "data:", "s3:", "oss:")
# Where a part of a content may hold its image's path: OpenAI's, transformers' and Qwen's names.
_REFERENCES = ("image_url", "image", "path", "url")


def content(place: Place, name: str, value: object) -> tuple[str, Parts]:
    """Return the text of a message's content, and its parts where it has images, else ()."""
    if isinstance(value, list):
        return content_parts(place, name, value)
    return text(place, name, of_kind(place, name, value, str, list)), ()


def content_parts(place: Place, name: str, parts: list[Any]) -> tuple[str, Parts]:
    """Return text and parts of a content that is a list of {type, …}, nothing put between."""
    found: list[str | Image] = []
    for part in parts:
        if not isinstance(part, dict):
            refuse(
                place,
                f"field '{name}' must be text or a list of {{type, text}}, found {json_type(part)} "
                "in the list",
                "Mend the row.",
            )
        kind = part.get("type", "text")
        if kind in ("image", "image_url"):
            number = 1 + sum(isinstance(each, Image) for each in found)
            found.append(_image_part(place, name, part, number))
        elif kind != "text":
            _refuse_part(place, name, kind, part)
        else:
            found.append(text(place, name, of_kind(place, "text", part.get("text"), str)))
    said = "".join(each for each in found if isinstance(each, str))
    return said, tuple(found) if any(isinstance(each, Image) for each in found) else ()


def referred_image(place: Place, name: str, value: object, number: int) -> Image:
    """Return the image that a row refers to.

    Args:
        place: of the row, or the turn.
        name: of the field, for errors.
        value: its path, or an object that holds it.
        number: of the image within the field, from 1, for errors.
    """
    part = Place(place.file, place.row, f"{place.part} image {number}".lstrip())
    if isinstance(value, dict):
        if value.get("bytes"):
            refuse(
                part,
                f"field '{name}' holds the image itself, and mst reads images from files",
                "Save it beside the data, and name its path.",
            )
        value = next((value[key] for key in _REFERENCES if value.get(key)), None)
    if isinstance(value, dict):  # {"image_url": {"url": …}}
        value = value.get("url")
    if not isinstance(value, str) or not value.strip():
        refuse(
            part,
            f"field '{name}' must be the image's path, found {json_type(value)}",
            "Mend the row.",
        )
    if is_remote(value):
        _refuse_remote(part, name)
    return find_image(part, text(part, name, value).strip().removeprefix("file://"))


def refuse_media(place: Place, fields: Mapping[str, Any], taken: tuple[str, ...] = ()) -> None:
    """Raise RowError for a row that brings images, video or sound beside its text.

    Args:
        place: of the row, or the turn.
        fields: its fields.
        taken: those that are read as images.
    """
    for name in _MEDIA:
        if fields.get(name) and name not in taken:
            _refuse_medium(place, name, fields[name])


def is_remote(value: Any) -> bool:
    """Return whether a reference names an address, anywhere within it."""
    if isinstance(value, dict):
        return any(is_remote(each) for each in value.values() if isinstance(each, (str, dict)))
    if isinstance(value, list):
        return any(is_remote(each) for each in value if isinstance(each, (str, dict)))
    return isinstance(value, str) and value.lstrip().lower().startswith(_REMOTE)


def _image_part(place: Place, name: str, part: Mapping[str, Any], number: int) -> Image:
    if not any(part.get(key) for key in (*_REFERENCES, "bytes")):
        return LISTED
    kind = part.get("type")
    return referred_image(place, f"{name}' of type '{kind}", part, number)


def _refuse_part(place: Place, name: str, kind: object, part: Mapping[str, Any]) -> None:
    if isinstance(kind, str) and kind.removesuffix("_url") in _MEDIA:
        _refuse_medium(place, f"{name}' of type '{kind}", part.get(kind, part))
    refuse(
        place,
        f"field '{name}' has a part whose 'type' is neither 'text' nor 'image'",
        "Write it as text, or remove it.",
    )


def _refuse_medium(place: Place, name: str, value: Any) -> None:
    if is_remote(value):
        _refuse_remote(place, name)
    if name in IMAGE_FIELDS:
        refuse(
            place,
            f"field '{name}' holds images, which are read beside a whole conversation alone",
            "Name them in a column of a row with messages or a prompt and its response.",
        )
    refuse(
        place,
        f"field '{name}' is video or sound, and mst trains on text and images",
        "Remove it together with what the text says about it, or remove the row.",
    )


def _refuse_remote(place: Place, name: str) -> None:
    refuse(
        place,
        f"field '{name}' names an address, and mst fetches nothing from anywhere",
        "Remove the row, or save the file beside the data and name its path.",
    )
