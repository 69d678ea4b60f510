"""A place of a person's own for the menu; what still runs there is ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mst import background


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory, and no work that other tests have left in the background."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path
    for each in background.works(works_of(tmp_path)):
        background.stop(each, kill=True)


@pytest.fixture
def fifo(place: Path) -> Path:
    path = place / "options.yaml"
    os.mkfifo(path)
    return path


def works_of(place: Path) -> Path:
    """Return where the works of a person's menu are kept."""
    return place / "state" / "mst" / "work"
