"""What the figures of runs, evaluations and exports are called, for the menu and the page."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from mst.translation import tables


def figure_names(language: str) -> dict[str, str]:
    """Return the words for each figure in a language, "en" or "zh", by the figure's name."""
    return {name: each[language] for name, each in _figures().items()}


def shares() -> frozenset[str]:
    """Return the names of the figures that are shares, from 0 to 1, and are shown in percent."""
    return frozenset(name for name, each in _figures().items() if each.get("share", False))


@lru_cache
def _figures() -> dict[str, dict[str, Any]]:
    return tables(Path(__file__).with_suffix(".toml"))
