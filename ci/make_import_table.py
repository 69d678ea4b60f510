"""Write the tables of docs/config-import.md from mst.foreign: `python ci/make_import_table.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mst.foreign.rules import COMMON
from mst.foreign.tool import Tool
from mst.foreign.translate import TOOLS

TARGET = Path(__file__).resolve().parents[1] / "docs" / "config-import.md"
# Defaults that depend on other settings, in words.
DEPENDS = {
    ("ms-swift", "learning_rate"): "1e-4; 1e-5 for full",
    ("ms-swift", "gradient_accumulation_steps"): "16 rows a step on all devices",
    ("ms-swift", "beta"): "0.1; 2 for simpo",
    ("ms-swift", "simpo_gamma"): "1 for simpo",
    ("ms-swift", "train_on"): "last for preferences but orpo",
    ("llama-factory", "lora_alpha"): "2 × rank",
    ("llama-factory", "beta"): "0.1",
    ("llama-factory", "train_on"): "last for preferences",
    ("axolotl", "beta"): "0.1",
    ("axolotl", "train_on"): "last for preferences",
    ("trl", "beta"): "0.1",
    ("trl", "learning_rate"): "2e-5; 1e-4 for rm; else 1e-6",
    ("trl", "train_on"): "all; last for preferences",
}


def _default(tool: Tool, name: str) -> str:
    if name not in tool.defaults:
        return ""
    value: Any = tool.defaults[name]
    return DEPENDS[tool.name, name] if callable(value) else f"`{value}`"


def defaults_table() -> str:
    """Return what each tool does where its file is silent, as mst writes it out."""
    names = list(dict.fromkeys(name for tool in TOOLS.values() for name in tool.defaults))
    head = "| option | " + " | ".join(tool.title for tool in TOOLS.values()) + " |"
    rows = [
        f"| `{name}` | " + " | ".join(_default(tool, name) for tool in TOOLS.values()) + " |"
        for name in names
    ]
    return "\n".join([head, "|---" * (len(TOOLS) + 1) + "|", *rows])


def dropped_table() -> str:
    """Return the keys that are dropped though they change the result, with the reason."""
    rows = ["| of | keys | reason |", "|---|---|---|"]
    groups = [("all", COMMON)] + [
        (tool.title, tuple(each for each in tool.dropped if each not in COMMON))
        for tool in TOOLS.values()
    ]
    for title, rules in groups:
        for each in rules:
            if each.effect == "changes":
                keys = ", ".join(f"`{spec.partition('=')[0]}`" for spec in each.keys.split())
                rows.append(f"| {title} | {keys} | {each.reason} |")
    return "\n".join(rows)


def document(text: str) -> str:
    """Return the document's text with fresh tables between its markers."""
    for name, table in (("defaults", defaults_table()), ("dropped", dropped_table())):
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    TARGET.write_text(document(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
