"""Torch's vendor extensions: only the one whose backend was activated may be loaded."""

from __future__ import annotations

import importlib.metadata
import sys

GROUP = "torch.backends"


def hide_extensions() -> None:
    """Make every extension that is not loaded yet look as if it were not installed.

    transformers imports torch_npu wherever it finds it, and that import fails beside a chip
    without its driver's libraries: a job on the CPU, or on another chip, would fail with it.
    """
    for point in importlib.metadata.entry_points(group=GROUP):
        # An extension may be loaded through a module of its own, beside the one of its name.
        # Python takes None for a module that can't be imported (its import system, 5.3.1), and
        # importlib.util.find_spec for one that is not there.
        for name in (point.module.partition(".")[0], point.name):
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
