"""The packages of the extra `serve`."""

from __future__ import annotations

import importlib.util

from mst.errors import ModelError

PACKAGES = ("uvicorn", "pydantic", "llguidance")
INSTALL = "python -m pip install 'mst-train[serve]'"


def check_packages() -> None:
    """Refuse to begin where one is missing.

    Raises:
        ModelError: with the command that installs it.
    """
    missing = [each for each in PACKAGES if importlib.util.find_spec(each) is None]
    if missing:
        raise ModelError(f"mst serve needs {', '.join(missing)}, not here. Type: {INSTALL}")
