"""Frozen dataclasses to JSON and back, strictly: an unknown or missing key is an error."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from cattrs.preconf.json import JsonConverter

T = TypeVar("T")


@lru_cache(maxsize=1)
def _converter() -> JsonConverter:
    # cattrs costs 0.05 CPU seconds to import, which `mst --help` need not pay.
    from cattrs.preconf.json import make_converter

    return make_converter(forbid_extra_keys=True)


def to_json(value: object) -> dict[str, Any]:
    """Return a frozen dataclass as plain dictionaries, lists, strings and numbers."""
    plain: dict[str, Any] = _converter().unstructure(value)
    return plain


def from_json(kind: type[T], plain: object) -> T:
    """Rebuild a dataclass of type `kind` from what `to_json` returned.

    Raises:
        ValueError: when a key is missing, unknown or of the wrong type; names the key.
    """
    from cattrs import transform_error
    from cattrs.errors import BaseValidationError

    try:
        return _converter().structure(plain, kind)
    except BaseValidationError as error:
        raise ValueError(f"not a {kind.__name__}: {'; '.join(transform_error(error))}") from error


def dumps(value: object) -> str:
    """Return the JSON text of a dataclass, keys in the order of its fields."""
    return json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n"


def load(kind: type[T], path: Path) -> T:
    """Read a dataclass of type `kind` from a JSON file.

    Raises:
        ValueError: when the file is not JSON or not such a dataclass.
    """
    return from_json(kind, json.loads(path.read_text(encoding="utf-8")))


def loads(kind: type[T], text: str) -> T:
    """Read a dataclass of type `kind` from JSON text.

    Raises:
        ValueError: when the text is not JSON or not such a dataclass.
    """
    return from_json(kind, json.loads(text))
