"""Who waits is told what goes on, on a terminal and where there is none."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mst.waiting import told_while


def test_a_log_has_a_line_now_and_then_and_none_of_what_is_soon_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter([0.0, 4.0, 11.0, 11.0, 15.0, 22.0, 22.0])
    monkeypatch.setattr("mst.waiting.time.monotonic", lambda: next(seconds))
    log = io.StringIO()

    with told_while(Console(file=log), "judging") as tell:
        for row in (1, 2, 3, 4):
            tell(f"{row} of 4 rows")

    assert log.getvalue().splitlines() == ["2 of 4 rows …", "4 of 4 rows …"]


def test_a_terminal_has_one_line_that_changes() -> None:
    screen = io.StringIO()

    with told_while(Console(file=screen, force_terminal=True), "judging") as tell:
        tell("1 of 4 rows")

    assert "\x1b[2K" in screen.getvalue()  # each line erases the one before
