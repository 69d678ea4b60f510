"""Logs to change, copy and look into."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mst.seal.audit.event import who
from mst.seal.audit.opening import open_directory

Write = Callable[..., None]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "audit"


@pytest.fixture
def write(directory: Path) -> Write:
    """Return a function that writes events in one opening of the log."""

    def written(count: int, segment_bytes: int = 1 << 30, text: str = "") -> None:
        log = open_directory(directory, who("0123456789ab"), segment_bytes)
        for number in range(count):
            log.append("test.step", {"number": number, "text": text})
        log.checkpoint()
        log.close()

    return written


@pytest.fixture(scope="session")
def three_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of three files and some 100 events, several checkpoints in each; copy it."""
    path = tmp_path_factory.mktemp("logs") / "audit"
    for opening in range(6):
        log = open_directory(path, who("0123456789ab"), 9_000)
        for number in range(12):
            log.append("test.step", {"number": number, "opening": opening})
        log.checkpoint()
        log.close()
    return path


@pytest.fixture
def copied(three_files: Path, tmp_path: Path) -> Path:
    path = shutil.copytree(three_files, tmp_path / "copied")
    # Opened once, so that a later change is noticed by the files' times, not by the copying.
    log = open_directory(path, who(""))
    log.checkpoint()
    log.close()
    return path
