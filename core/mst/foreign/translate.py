"""From their file to our options: which tool it is of, and what became of each setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.cli.options import nearest
from mst.errors import UsageError
from mst.foreign import rules
from mst.foreign.axolotl import AXOLOTL
from mst.foreign.draft import Draft, Left, Written
from mst.foreign.llama_factory import LLAMA_FACTORY
from mst.foreign.ms_swift import MS_SWIFT
from mst.foreign.placing import placing
from mst.foreign.source import Source
from mst.foreign.tool import Tool
from mst.foreign.trl import TRL
from mst.request import fields

TOOLS = {each.name: each for each in (MS_SWIFT, LLAMA_FACTORY, AXOLOTL, TRL)}

# Files that lie beside configurations of trainers, by a key that only they have.
_OTHERS = {
    "compute_environment": "a configuration of accelerate",
    "distributed_type": "a configuration of accelerate",
    "zero_optimization": "a configuration of DeepSpeed",
    "model_class": "a configuration of LLaMA-Factory's v1",
    "export_dir": "a configuration of LLaMA-Factory's export",
}


@dataclass(frozen=True)
class Translation:
    """What became of a file.

    Attributes:
        tool: whose configuration it is.
        options: ours, in the order of `mst train --help`.
        translated: options that the file says.
        defaults: options that the file doesn't say, with the tool's default.
        left: settings that aren't carried over.
        unknown: keys that the tool isn't known to have, each with a hint or "".
    """

    tool: str
    options: Mapping[str, Any]
    translated: tuple[Written, ...]
    defaults: tuple[Written, ...]
    left: tuple[Left, ...]
    unknown: tuple[tuple[str, str], ...]


def which_tool(source: Source, asked: str, path: Path) -> Tool:
    """Return the tool that a file is of: as asked, as its command says, or by its keys.

    Raises:
        UsageError: no tool or several fit, or the command is of another one than was asked for.
    """
    if asked != "auto":
        if source.tool not in (None, asked):
            raise UsageError(
                f"--from {asked} was given, but {path} holds a command of {source.tool}. Leave"
                " --from out."
            )
        return TOOLS[asked]
    if source.tool is not None:
        return TOOLS[source.tool]
    for key, what in _OTHERS.items():
        if source.values.get(key) is not None:
            raise UsageError(
                f"{path} is {what}, which is not translated. Give the file with the options of the"
                " training, or the script that starts it."
            )
    hits = {name: len(set(tool.marks.split()) & set(source.values)) for name, tool in TOOLS.items()}
    best = max(hits.values())
    fitting = [name for name, count in hits.items() if count == best]
    if best and len(fitting) == 1:
        return TOOLS[fitting[0]]
    if not best and source.values and set(source.values) <= set(fields()):
        raise UsageError(
            f"{path} has options of mst, and of no other tool alone. Use it as it is: mst plan"
            f" {path}. If another tool wrote it, name that with --from {'|'.join(TOOLS)}."
        )
    found = f"keys of {' and of '.join(fitting)}" if best else "no key that tells the tool"
    raise UsageError(f"{path} has {found}. Name the tool: --from {'|'.join(fitting)}.")


def translate(source: Source, tool: Tool, directory: Path) -> Translation:
    """Return a file's settings as ours; each key of theirs is accounted for.

    Args:
        source: what the file says.
        tool: whose it is.
        directory: where the file lies, for paths that it names.
    """
    draft = Draft(source.values, source.command, directory)
    tool.translate(draft)
    unknown = rules.apply(draft, tool.renamed, tool.dropped)
    placing(draft, source, tool.name)
    defaults = _defaults(draft, tool)
    order = list(fields())
    known = [*tool.renamed, *tool.marks.split(), *draft.taken - set(unknown)]
    return Translation(
        tool=tool.name,
        options=dict(sorted(draft.options.items(), key=lambda each: order.index(each[0]))),
        translated=tuple(draft.written),
        defaults=defaults,
        left=tuple(draft.left),
        unknown=tuple((key, nearest(key, known).strip()) for key in unknown),
    )


def _defaults(draft: Draft, tool: Tool) -> tuple[Written, ...]:
    """Write the tool's defaults where the file is silent, and return them."""
    spoken = len(draft.written)
    for name, value in tool.defaults.items():
        if name in draft.options or name in draft.undecided or name not in fields():
            continue
        if draft.options.get("tuner") == "full" and name.startswith("lora_"):
            continue
        if name == "val_size" and "val_dataset" in draft.options:
            continue
        found = value(draft.options) if callable(value) else value
        if found is not None:
            draft.keep(name, found, "")
    defaults = tuple(draft.written[spoken:])
    del draft.written[spoken:]
    return defaults
