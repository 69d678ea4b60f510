"""How far a work in the background is: a run's curve and its next figures, or what it prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

from mst.background import Work, output, run_of, was_stopped
from mst.menu.screen import command_line, shortened, width
from mst.menu.words import Words, duration_words
from mst.translation import translated_lines

_CURVE_ROWS = 9
_CURVE_COLUMNS = 60
_LINES = 8
# Steps whose mean says how long the others take.
_PACE_STEPS = 20
_OF_STEPS = {"step", "loss", "learning_rate", "tokens", "tokens_per_second"}
_ASCII = str.maketrans("•◆│└─█…", "*o|+-#.")


@dataclass(frozen=True)
class Progress:
    """A moment of a work.

    Attributes:
        line: the moment in one line.
        lines: what is drawn above it, where the terminal allows.
        step: of a run; -1 for other works.
    """

    line: str
    lines: tuple[str, ...]
    step: int = -1


def title_of(words: Words, work: Work) -> str:
    """Return a work in one line, for lists."""
    began = work.started[11:16]
    with suppress(ValueError):
        began = datetime.fromisoformat(work.started).astimezone().strftime("%m-%d %H:%M")
    state = words("state.interrupted" if was_stopped(work) else f"state.{work.state}")
    return f"{state}  {began}  {_what(words, work)}"


def _what(words: Words, work: Work) -> str:
    """Return what a work does with which run; as it was typed where the menu has no word for it."""
    command, *rest = work.arguments
    run = run_of(work)
    if run is not None:
        return f"{words('kinds.train')}  {run.name}"
    if f"kinds.{command}" not in words.texts or not rest or rest[0].startswith("-"):
        return command_line(work.arguments)[4:]
    form = f"{rest[rest.index('--format') + 1]}, " if "--format" in rest[:-1] else ""
    kind = words(f"kinds.{command}")
    return f"{kind}  {form}{Path(rest[0]).name}"


def progress_of(words: Words, work: Work, ascii_alone: bool) -> Progress:
    """Return where a work stands."""
    run = run_of(work)
    found = None if run is None else _of_run(words, run)
    if found is None:
        found = _of_output(words, work)
    if ascii_alone:
        lines = tuple(each.translate(_ASCII) for each in found.lines)
        return Progress(found.line.translate(_ASCII), lines, found.step)
    return found


def _of_output(words: Words, work: Work) -> Progress:
    """Return what a work has printed last; in another language what is known in it alone."""
    printed = [each for each in output(work, 1 << 14).splitlines() if each.strip()]
    if words.language != "en":
        said = [translated_lines(each, words.language) for each in printed]
        printed = [told for told, each in zip(said, printed, strict=True) if told != each]
    lines = tuple(shortened(each, width()) for each in printed[-_LINES:])
    if lines:
        return Progress(lines[-1], lines[:-1])
    minutes = 0
    with suppress(ValueError):
        since = datetime.now(timezone.utc) - datetime.fromisoformat(work.started)
        minutes = int(since.total_seconds() // 60)
    # In whole minutes, since a plain terminal gets a line for each that is another.
    text = words("watch.since", minutes=minutes) if minutes else words("watch.beginning")
    return Progress(text, ())


def _of_run(words: Words, run: Path) -> Progress | None:
    """Return a run's progress, or None before its first step."""
    lines = _metrics(run)
    steps = [each for each in lines if each.keys() >= _OF_STEPS]
    if not steps:
        return None
    from mst.curve import draw

    newest = steps[-1]
    held_out = [(each["step"], each["eval_loss"]) for each in lines if "eval_loss" in each]
    drawn = draw(
        {
            words("watch.loss"): [(each["step"], each["loss"]) for each in steps],
            words("watch.eval_loss"): held_out,
        },
        width=max(20, min(width() - 14, _CURVE_COLUMNS)),
        height=_CURVE_ROWS,
    )
    total = _total_steps(run)
    line = words(
        "watch.step",
        step=newest["step"],
        total=total or "?",
        loss=f"{newest['loss']:.4g}",
        rate=f"{newest['learning_rate']:.2g}",
        speed=f"{newest['tokens_per_second']:.0f}",
    )
    left = _seconds_left(steps, total)
    if left is not None:
        line += words("watch.left", time=duration_words(words, left))
    return Progress(line, tuple(drawn.splitlines()), int(newest["step"]))


def _metrics(run: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's figures; a run may vanish while it is watched."""
    found = []
    with suppress(OSError):
        text = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            with suppress(ValueError):
                plain = json.loads(line)
                if isinstance(plain, dict) and isinstance(plain.get("step"), int):
                    found.append(plain)
    return found


def _total_steps(run: Path) -> int:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((run / "plan.json").read_text(encoding="utf-8"))["total_steps"])
    return 0


def _seconds_left(steps: Sequence[Mapping[str, Any]], total: int) -> float | None:
    """Return how long the other steps take at the pace of the newest; None when it can't be told.

    The first step is none to go by: it compiles, and touches all memory for the first time.
    """
    known = steps[-_PACE_STEPS - 1 :]
    seconds, taken = 0.0, known[-1]["step"] - known[0]["step"]
    for before, each in pairwise(known):
        if each["tokens_per_second"] <= 0:
            return None
        # Of the last step of these alone, which stands for all where not each is logged.
        seconds += (each["tokens"] - before["tokens"]) / each["tokens_per_second"]
    rest = total - known[-1]["step"]
    return seconds / taken * rest if min(taken, seconds, rest) > 0 else None
