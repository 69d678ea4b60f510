"""The packages of the extra `serve`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from mst.errors import ModelError

PACKAGES = ("uvicorn", "pydantic", "llguidance")
INSTALL = "python -m pip install 'mst-train[serve]'"


def check_packages() -> None:
    """Refuse to begin where one is missing.

    Raises:
        ModelError: with the command that installs it.
    """
    if told := lacking("mst serve", PACKAGES):
        raise ModelError(told)


def lacking(command: str, packages: Sequence[str]) -> str:
    """Return which packages a command misses, and what installs them; "" where all are here."""
    missing = [each for each in packages if importlib.util.find_spec(each) is None]
    return f"{command} needs {', '.join(missing)}, not here. Type: {INSTALL}" if missing else ""
