"""Write docs/options.md from mst.options: `python ci/make_options_doc.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mst.cli.options import TITLES
from mst.request import fields

TARGET = Path(__file__).resolve().parents[1] / "docs" / "options.md"
KINDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true, false",
    "tuple[str, ...]": "one or more",
}
HEAD = """# Options

Made by `ci/make_options_doc.py`; do not edit. `mst train` and `mst plan` take each of these as a
flag (`--lora-rank 8` or `--lora_rank 8`) and as a key of their YAML file (`lora_rank: 8`). A flag
overrides the file. In YAML, an option that takes one or more values is a list, or text with
commas. "-" as the default means that the planner chooses, or that there is none. The last column
has names that other tools use, which are accepted too.
"""
COLUMNS = "| option | takes | default | meaning | also |\n|---|---|---|---|---|"


def takes(each: dataclasses.Field[Any]) -> str:
    """Return what values an option accepts, in words."""
    meta = each.metadata
    if meta["choices"]:
        words = [f"`{choice}`" for choice in meta["choices"]]
        return ", ".join([*words, *(["whole number"] if meta["or_count"] else [])])
    # Annotations are text, since mst.options postpones their evaluation.
    kind = KINDS[str(each.type).removesuffix(" | None")]
    if meta["metavar"]:
        shown = "`" + meta["metavar"].replace("|", "` or `") + "`"
        return f"{kind} {shown}" if kind == "one or more" else shown
    limits = (("at_least", "at least"), ("above", "above"), ("below", "below"))
    words = [f"{words} {meta[key]:g}" for key, words in limits if meta[key] is not None]
    return ", ".join([kind, *words])


def default(each: dataclasses.Field[Any]) -> str:
    """Return an option's default as one writes it in YAML."""
    value = each.default
    if value is None or value == ():
        return "-"
    if isinstance(value, tuple):
        return "`" + ", ".join(value) + "`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def row(name: str, each: dataclasses.Field[Any]) -> str:
    """Return an option's line of the table."""
    also = ", ".join(f"`{alias}`" for alias in each.metadata["aliases"])
    # A bare <date> would be taken for an HTML tag.
    meaning = each.metadata["help"].replace("|", "\\|").replace("<", "&lt;")
    return f"| `{name}` | {takes(each)} | {default(each)} | {meaning} | {also} |"


def document() -> str:
    """Return the text of docs/options.md."""
    parts = [HEAD]
    for group, title in TITLES.items():
        rows = [row(n, each) for n, each in fields().items() if each.metadata["group"] == group]
        parts.append(f"## {title.capitalize()}\n\n{COLUMNS}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
