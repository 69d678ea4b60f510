"""What a tool's module says about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mst.foreign.draft import Draft
from mst.foreign.rules import Dropped


@dataclass(frozen=True)
class Tool:
    """One trainer whose configurations are translated.

    Attributes:
        name: as `--from` takes it.
        title: as its makers write it.
        marks: keys that it has and the others haven't, separated by spaces.
        renamed: keys that mean the same as an option of ours, whose value is taken as it is.
        dropped: keys that aren't carried over.
        translate: takes from the draft what needs more than a rename.
        defaults: what it does where the file is silent and mst would do otherwise: our option to
            its value, or to a function of the options written so far (None: not written).
    """

    name: str
    title: str
    marks: str
    renamed: Mapping[str, str]
    dropped: tuple[Dropped, ...]
    translate: Callable[[Draft], None]
    defaults: Mapping[str, Any]
