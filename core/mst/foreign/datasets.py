"""Data sets that they name: files stay, names of registries and hubs need a file in their place."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mst.foreign.draft import Draft, number
from mst.request import fields

SUFFIXES = (
    ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt",
    ".jsonl.gz", ".json.gz", ".csv.gz", ".jsonl.zst", ".zst", ".gz",
)  # fmt: skip
RENAME_COLUMNS = "mst tells columns by their names: rename those of the file"
NEEDS_A_FILE = "a name on a hub or in a registry: put a local file's path in its place"


def is_local(draft: Draft, text: str) -> bool:
    """Return whether a data set is a file or a directory, by its name or because it is there."""
    looks = text.startswith(("/", "./", "../", "~")) or text.lower().endswith(SUFFIXES)
    return looks or draft.path(text).exists()


def write(draft: Draft, name: str, paths: list[str], key: str) -> None:
    """Write data sets; those that aren't local are kept, to be replaced, with a warning."""
    if not paths:
        return
    draft.keep(name, paths, key)
    if not all(is_local(draft, re.sub(r"#~?\d+$", "", each)) for each in paths):
        draft.drop(key, NEEDS_A_FILE, "check")


def limited(draft: Draft, paths: list[str], count: Any, key: str, drawn: bool = False) -> list[str]:
    """Return paths with their largest number of rows, where mst takes that.

    Args:
        draft: the translation.
        paths: the data sets.
        count: rows of each; None for all.
        key: what asks for it.
        drawn: the rows are drawn, and not the first ones.
    """
    rows = number(count)
    if count is None or rows is None or rows < 1:
        return paths
    sign = "#~" if drawn else "#"
    if sign in fields()["dataset"].metadata["help"]:
        return [f"{path}{sign}{int(rows)}" for path in paths]
    draft.drop(key, "mst takes all rows of a file: cut the file", "changes")
    return paths


def registered(draft: Draft, names: list[str], directory: str) -> list[str]:
    """Return what `--dataset` takes for names of LLaMA-Factory's dataset_info.json."""
    known = _registry(draft, directory)
    files = {
        name: str(Path(directory) / entry["file_name"])
        for name, entry in known.items()
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)
    }
    if not all(name in files for name in names):
        draft.drop(draft.spelt("dataset", "eval_dataset"), NEEDS_A_FILE, "check")
    if "dataset_info" in fields():
        # It reads the registry itself, with what each column and tag is.
        if "dataset_info" not in draft.options and names:
            draft.keep("dataset_info", directory, "dataset_dir")
        return names
    if any(
        known[name].get("columns") or known[name].get("tags") for name in names if name in files
    ):
        draft.drop("columns of dataset_info.json", RENAME_COLUMNS, "check")
    return [files.get(name, name) for name in names]


def _registry(draft: Draft, directory: str) -> dict[str, Any]:
    file = draft.path(directory) / "dataset_info.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        known = {}
    return known if isinstance(known, dict) else {}


def columns(draft: Draft, roles: Mapping[str, str], key: str) -> None:
    """Write what columns are for, column to role, or say that they must be renamed."""
    renamed = {column: role for column, role in roles.items() if column != role}
    if not renamed:
        return
    before: list[str] = draft.options.get("columns", [])
    pairs = list(
        dict.fromkeys([*before, *(f"{column}={role}" for column, role in renamed.items())])
    )
    given = [pair.split("=")[1] for pair in pairs]
    if "columns" not in fields() or len(given) != len(set(given)) or any("," in p for p in pairs):
        draft.drop(key, RENAME_COLUMNS, "check")
        return
    draft.written = [each for each in draft.written if each.name != "columns"]
    draft.keep("columns", pairs, key)
