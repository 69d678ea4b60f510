"""What the user asks for. Flags, YAML keys, help texts and error hints all come from here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mst.options.data import DataOptions
from mst.options.job import JobOptions
from mst.options.length import LengthOptions
from mst.options.memory import MemoryOptions
from mst.options.method import MethodOptions
from mst.options.objective import ObjectiveOptions
from mst.options.optimizer import OptimizerOptions
from mst.options.privacy import PrivacyOptions
from mst.options.run import RunOptions
from mst.options.seal import SealOptions

# What comes with mst for `--task`; each is also a command: `mst dpo` is `mst train --task dpo`.
TASKS = ("sft", "pt", "dpo", "kto", "orpo", "simpo", "rm", "grpo")


@dataclass(frozen=True)
class TrainRequest(
    JobOptions,
    DataOptions,
    MethodOptions,
    ObjectiveOptions,
    LengthOptions,
    PrivacyOptions,
    OptimizerOptions,
    MemoryOptions,
    RunOptions,
    SealOptions,
):
    """Everything `mst train` and `mst plan` can be asked; None leaves the choice to the planner.

    The bases hold its fields, a group of options each, in the order of the help.
    """


def fields() -> dict[str, dataclasses.Field[Any]]:
    """Return every option by its canonical name, in the order of the help."""
    # `dataclasses.fields(TrainRequest)` would begin with those of the last base.
    groups: tuple[Any, ...] = TrainRequest.__bases__
    return {each.name: each for group in groups for each in dataclasses.fields(group)}


def alias_names() -> dict[str, str]:
    """Return peers' names for our options: alias to canonical name."""
    return {alias: name for name, each in fields().items() for alias in each.metadata["aliases"]}
