"""LLaMA-Factory's dataset_info.json: names of data sets, their files, columns and tags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mst.data.shapes.turns import USUAL, Tags
from mst.errors import DataError

FILE_NAME = "dataset_info.json"
# Its names of columns, and ours. Its `query` is what Alpaca calls the input.
_ROLES = {
    "prompt": "prompt", "query": "input", "response": "response", "history": "history",
    "messages": "messages", "system": "system", "tools": "tools", "chosen": "chosen",
    "rejected": "rejected", "kto_tag": "label", "images": "images",
}  # fmt: skip
_MEDIA = ("videos", "audios")
_ROLE_TAGS = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool",
    "function_tag": "call", "system_tag": "system",
}  # fmt: skip
_REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


@dataclass(frozen=True)
class Registered:
    """What dataset_info.json says about one data set.

    Attributes:
        path: its file, directory or glob.
        mapping: role to column.
        tags: names within its turns.
        num_samples: its first rows; None for all.
    """

    path: Path = Path()
    mapping: Mapping[str, str] = field(default_factory=dict)
    tags: Tags = USUAL
    num_samples: int | None = None


def names(where: str) -> list[str]:
    """Return the data sets that are registered."""
    return sorted(_read(_file(where)))


def registered(where: str, name: str) -> Registered | None:
    """Return what is registered under a name, or None.

    Args:
        where: dataset_info.json, or its directory, in which the data files lie too.
        name: of a data set.

    Raises:
        DataError: the file is not there or damaged, or the data set lies on a hub.
    """
    file = _file(where)
    listed = _read(file)
    if name not in listed:
        return None
    entry = listed[name]
    if not isinstance(entry, dict):
        raise DataError(f"{file}: '{name}' must be an object. Mend the file.")
    file_name = entry.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        hubs = [each for each in _REMOTE if entry.get(each)]
        found = f"only '{hubs[0]}', and mst fetches nothing" if hubs else "no 'file_name'"
        raise DataError(
            f"{file}: '{name}' has {found}. Copy the data here and name it as 'file_name'."
        )
    samples = entry.get("num_samples")
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise DataError(f"{file}: 'num_samples' of '{name}' must be a whole number from 1.")
    columns = _texts(file, name, entry, "columns")
    return Registered(
        path=file.parent / file_name,
        mapping=_mapping(file, name, columns),
        tags=_tags(_texts(file, name, entry, "tags")),
        num_samples=samples,
    )


def _file(where: str) -> Path:
    path = Path(where).expanduser().absolute()
    return path / FILE_NAME if path.is_dir() else path


def _read(file: Path) -> dict[str, Any]:
    try:
        listed = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(
            f"--dataset-info {file}: {error.strerror}. Pass dataset_info.json, or its directory."
        ) from None
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, dict):
        raise DataError(f"{file} must be one JSON object of data sets by name. Mend it.")
    return listed


def _texts(file: Path, name: str, entry: Mapping[str, Any], key: str) -> dict[str, str]:
    value = entry.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise DataError(f"{file}: '{key}' of '{name}' must be an object of texts. Mend the file.")
    return value


def _mapping(file: Path, name: str, columns: Mapping[str, str]) -> dict[str, str]:
    unknown = [each for each in columns if each not in (*_ROLES, *_MEDIA)]
    if unknown:
        raise DataError(
            f"{file}: 'columns' of '{name}' has '{unknown[0]}', which is none of "
            f"{', '.join(_ROLES)}. Mend the file."
        )
    found = {_ROLES[key]: column for key, column in columns.items() if key in _ROLES}
    if "rejected" in found:
        # Its ranking sets name the prompt, and may name a response that no one reads.
        found.pop("response", None)
    return found


def _tags(tags: Mapping[str, str]) -> Tags:
    roles = tuple((tags[key], role) for key, role in _ROLE_TAGS.items() if key in tags)
    return Tags(tags.get("role_tag", ""), tags.get("content_tag", ""), roles)
