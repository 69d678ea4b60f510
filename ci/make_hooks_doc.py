"""Write docs/hooks.md from mst.hookspecs: `python ci/make_hooks_doc.py`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from mst.hookspecs import backends, engines, export_targets, objectives

TARGET = Path(__file__).resolve().parents[1] / "docs" / "hooks.md"
HEAD = """# Hooks

Made by `ci/make_hooks_doc.py` from `core/mst/hookspecs/`; do not edit. Each hook a plugin may
have: when it is called, what it gets and returns, and what happens when it raises. What a plugin
is, which hooks it needs and a whole backend: [plugins.md](plugins.md). From a new chip to a
published plugin: [vendors.md](vendors.md).
"""
# The modules of specifications, by what a plugin with those hooks is.
KINDS = {
    "Device backends": backends,
    "Export targets": export_targets,
    "Objectives": objectives,
    "Serving engines": engines,
}
# "Args:" and the like stand alone on a line of the docstring; a Python block is left as it is.
SECTION = re.compile(r"^(Called|Args|Returns|If it raises|Example):$", re.MULTILINE)
ARGUMENT = re.compile(r"^(\w+): ", re.MULTILINE)
Hook = Callable[..., object]


def hooks(module: ModuleType) -> Iterator[tuple[str, Hook]]:
    """Yield name and specification of every hook, in the module's order."""
    for name, value in vars(module).items():
        if name.startswith("mst_") and inspect.isfunction(value):
            yield name, value


def signature(name: str, hook: Hook) -> str:
    """Return a hook's line of Python, with types as a plugin's author writes them."""
    # Annotations are text, since mst.hookspecs postpones their evaluation.
    found = inspect.signature(hook)
    arguments = ", ".join(f"{each.name}: {each.annotation}" for each in found.parameters.values())
    return f"def {name}({arguments}) -> {found.return_annotation}"


def part(title: str, body: str) -> str:
    """Return one section of a docstring as Markdown."""
    text = textwrap.dedent(body).strip("\n")
    if title == "Example":
        return f"Example:\n\n{text}"
    if title == "Args":
        # A line that goes on is indented as Markdown wants it below "- ".
        listed = ARGUMENT.sub(r"- `\1`: ", text)
        return "Arguments:\n\n" + re.sub(r"^ {4}", "  ", listed, flags=re.MULTILINE)
    return f"**{title}:** {text}"


def entry(name: str, hook: Hook) -> str:
    """Return a hook's part of the document."""
    text = inspect.getdoc(hook) or ""
    text, _, added = text.rpartition("\n\nAdded in ")
    # The first part is the summary; then titles and bodies follow each other.
    summary, *rest = SECTION.split(text)
    parts = [part(*pair) for pair in zip(rest[::2], rest[1::2], strict=True)]
    head = f"### {name}\n\n```text\n{signature(name, hook)}\n```"
    return "\n\n".join([head, summary.strip(), *parts, f"Added in {added}"])


def document() -> str:
    """Return the text of docs/hooks.md."""
    parts = [HEAD]
    for title, module in KINDS.items():
        entries = [entry(name, hook) for name, hook in hooks(module)]
        parts.append(f"## {title}\n\n" + "\n\n".join(entries) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
