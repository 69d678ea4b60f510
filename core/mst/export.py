"""What an export target is asked for and what it hands back: types only, the contract of a target.

The work is done by plugins that implement `mst_export` (see `mst.hookspecs`). An export counts as
done when it has been compared with its source, and the report carries the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and where to.

    Attributes:
        run_dir: directory of a finished run; its manifest says which adapter and which base.
        model_dir: directory of the base model that the run was tuned from.
        output_dir: empty directory that exists; the target writes there and nowhere else.
        options: the target's own options as text, as in `--option group_size=128`.
    """

    run_dir: str
    model_dir: str
    output_dir: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it was compared with its source.

    Attributes:
        format: the target's name, as `mst_export_name` returns it.
        path: what a serving engine is pointed at; `output_dir` or a file in it.
        files: every file written, relative to `output_dir`, sorted.
        checked: comparison by name, with its figure as text ("largest logit difference":
            "0.0021"); what could not be compared here reads "not checked: " and why.
    """

    format: str
    path: str
    files: tuple[str, ...]
    checked: Mapping[str, str] = field(default_factory=dict)
