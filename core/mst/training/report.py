"""What the loop tells: a line of metrics for the run directory, a progress bar for the person."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import IO, TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        epoch: passes over the data after this step.
        loss: the objective's, over the step's global batch.
        learning_rate: that was used.
        grad_norm: before clipping.
        tokens: trained on since the run began, padding not counted.
        tokens_per_second: of this step, padding not counted.
        memory_bytes: the peak on this process's device since training began.
        metrics: what the objective measures besides, over the step's global batch.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    memory_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalMetrics:
    """One evaluation on the held-out rows: the objective's loss and metrics over all of them."""

    step: int
    epoch: float
    eval_loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class Reporter(Protocol):
    """Where the loop's events go. No event carries a row's text."""

    def step(self, metrics: StepMetrics) -> None:
        """An optimizer step is done."""

    def evaluation(self, metrics: EvalMetrics) -> None:
        """An evaluation is done."""

    def saved(self, step: int) -> None:
        """A checkpoint is whole on disk."""

    def shrunk(self, step: int, before: int, after: int) -> None:
        """A step did not fit into memory; from it on, micro-batches have `after` rows."""


class MetricsFile:
    """Writes each event as one JSON line."""

    def __init__(self, file: IO[str], every: int) -> None:
        """Write to `file`, one step in `every`."""
        self._file = file
        self._every = every

    def _write(self, metrics: StepMetrics | EvalMetrics) -> None:
        line = asdict(metrics)
        prefix = "eval_" if isinstance(metrics, EvalMetrics) else ""
        line |= {f"{prefix}{name}": value for name, value in line.pop("metrics").items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def step(self, metrics: StepMetrics) -> None:
        """Write every so many steps."""
        if metrics.step % self._every == 0:
            self._write(metrics)

    def evaluation(self, metrics: EvalMetrics) -> None:
        """Write always."""
        self._write(metrics)

    def saved(self, step: int) -> None:
        """Checkpoints are seen in their directory."""

    def shrunk(self, step: int, before: int, after: int) -> None:
        """The checkpoints hold the new size."""


class ProgressBar:
    """A live bar on a terminal; a plain line every few seconds elsewhere."""

    # A log file of a long run should stay readable.
    _SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        """Begin at `first_step` of `total_steps`."""
        self._console = console
        self._total = total_steps
        self._first = first_step
        self._began = time.monotonic()
        self._last_line = 0.0
        self._eval = ""
        self._bar: Progress | None = None
        if console.is_terminal:
            self._start_bar()

    def _start_bar(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=self._total, completed=self._first, shown="")
        self._bar.start()

    def _left(self, step: int) -> str:
        done = step - self._first
        seconds = (time.monotonic() - self._began) / max(1, done) * (self._total - step)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"

    def step(self, metrics: StepMetrics) -> None:
        """Move the bar, or print a line when it is time."""
        shown = f"loss {metrics.loss:.4f}{_preference(metrics.metrics)}{self._eval}"
        shown += f"  {metrics.tokens_per_second:.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step, shown=shown)
            return
        now = time.monotonic()
        if now - self._last_line >= self._SECONDS_BETWEEN_LINES or metrics.step == self._total:
            self._last_line = now
            left = self._left(metrics.step)
            self._console.print(f"step {metrics.step}/{self._total}  {shown}  {left}")

    def evaluation(self, metrics: EvalMetrics) -> None:
        """Show the held-out loss beside the training loss."""
        self._eval = f"  held-out loss {metrics.eval_loss:.4f}{_preference(metrics.metrics)}"
        if self._bar is None:
            self._console.print(f"step {metrics.step}/{self._total}{self._eval}")

    def saved(self, step: int) -> None:
        """A checkpoint needs no line: the run directory shows it."""

    def shrunk(self, step: int, before: int, after: int) -> None:
        """Say that the step is taken again, in smaller pieces."""
        self._console.print(
            f"step {step} did not fit into memory in micro-batches of {before} rows: going on with"
            f" {after}, and the same global batch"
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _preference(metrics: Mapping[str, float]) -> str:
    """Return what a person looks at first of an objective over preferences or rewards, or ""."""
    shown = (
        ("rewards/margins", "margin", ".3f"),
        ("rewards/accuracies", "right", ".0%"),
        ("reward", "reward", ".3f"),
        ("completion_length", "length", ".1f"),
    )
    found = ((words, form, metrics[name]) for name, words, form in shown if name in metrics)
    return "".join(f"  {words} {value:{form}}" for words, form, value in found)


class Reporters:
    """Hands each event to several reporters."""

    def __init__(self, *reporters: Reporter) -> None:
        """Keep the order."""
        self._reporters = reporters

    def step(self, metrics: StepMetrics) -> None:
        """An optimizer step is done."""
        for each in self._reporters:
            each.step(metrics)

    def evaluation(self, metrics: EvalMetrics) -> None:
        """An evaluation is done."""
        for each in self._reporters:
            each.evaluation(metrics)

    def saved(self, step: int) -> None:
        """A checkpoint is whole on disk."""
        for each in self._reporters:
            each.saved(step)

    def shrunk(self, step: int, before: int, after: int) -> None:
        """Micro-batches have become smaller."""
        for each in self._reporters:
            each.shrunk(step, before, after)
