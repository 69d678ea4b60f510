"""What the trainers of `benchmarks/train_throughput.py` are given, and what is noted of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mst.data.encode import Example
from mst.data.prepare import Prepared, prepare
from mst.data.rows import Row
from mst.demo import demo_data
from mst.request import TrainRequest
from mst.training.order import row_sizes, step_rows

WARM_UP = 2
RANK = 8
RATE = 2e-4
SEED = 42
ROWS = 120
MAX_LENGTH = 512


@dataclass(frozen=True)
class Task:
    """What all sides do.

    Attributes:
        dataset: rows in any format; None for the demo's.
        dtype: of the matrix products and the weights.
        batch: rows a step.
        length: tokens of each made-up row; None for the data set's rows.
        steps: optimizer steps, `WARM_UP` of which are not timed.
        threads: of each side.
    """

    dataset: str | None
    dtype: str
    batch: int
    length: int | None
    steps: int
    threads: int


class Clock:
    """Collects what a trainer reports of each step."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.losses: list[float] = []
        self.ends: list[float] = []
        self.processor_ends: list[float] = []
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.compile_seconds = 0.0

    def step(self, metrics: Any) -> None:
        """Note the loss, the time, and this process's own on all its threads."""
        self.losses.append(metrics.loss)
        self.ends.append(time.perf_counter())
        self.processor_ends.append(time.process_time())

    def evaluation(self, metrics: Any) -> None:
        """Nothing is held out."""

    def saved(self, step: int) -> None:
        """Saving is not timed: the last step's time is taken before it."""

    def shrunk(self, step: int, before: int, after: int) -> None:
        """Not asked for."""

    def count(self, rows: Sequence[Any], batch: int) -> None:
        """Note the tokens of each step of `batch` rows."""
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            self.tokens.append(sum(len(each.input_ids) for each in part))
            self.labels.append(sum(label != -100 for each in part for label in each.labels))


def prepared_rows(model_dir: Path, task: Task) -> Prepared:
    """Return the first rows of the data set, long ones cut; or made-up ones of one length."""
    request = TrainRequest(
        val_size=0.0, max_length=MAX_LENGTH, truncation_strategy="right", model=str(model_dir)
    )
    source = (f"{task.dataset}#{ROWS}",) if task.dataset else demo_data()[:1]
    found = prepare(request, source, model_dir, None)
    if task.length is None:
        return found
    return replace(found, train=replace(found.train, examples=_even(task)))


def _even(task: Task) -> list[Example]:
    """Return rows of one length, the last quarter of which carries loss."""
    import random
    from array import array

    draw = random.Random(SEED)
    length = task.length or 0
    rows = []
    for number in range(task.batch * task.steps):
        ids = array("i", [draw.randrange(100, 40_000) for _ in range(length)])
        labels = array("i", [-100] * (length - length // 4)) + ids[length - length // 4 :]
        rows.append(Example(ids, labels, Row((), "made up", number)))
    return rows


def rows_of_steps(prepared: Prepared, task: Task) -> list[Any]:
    """Return the examples in the order in which all sides but packed ones see them."""
    rows = prepared.train.examples
    sizes = row_sizes(rows, None)
    steps = range(task.steps)
    return [rows[i] for step in steps for (i,) in step_rows(sizes, step, task.batch, SEED)]


def product_rate(dtype: str) -> float:
    """Return the operations a second of one square product, the best of ten."""
    import torch

    size = 2048
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    return float(2 * size**3 / min(times))
