"""MST, the Multi-Silicon Trainer.

The public names of the Python API are loaded when they are first used, so `import mst` costs
nothing and works where torch is broken.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mst.api import train
    from mst.training.adapters import merge_and_unload, prepare_model

__version__ = "0.1.0"
__all__ = ["__version__", "merge_and_unload", "prepare_model", "train"]

_HOMES = {
    "train": "mst.api",
    "prepare_model": "mst.training.adapters",
    "merge_and_unload": "mst.training.adapters",
}


def __getattr__(name: str) -> Any:
    """Return a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names too, loaded or not."""
    return sorted({*globals(), *__all__})
