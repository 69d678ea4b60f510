"""How cells are measured: what a matrix says once, and each of its cells carries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Procedure:
    """Rows, steps, and what else is done with a cell.

    Attributes:
        dataset: as `--dataset` takes it; empty for the embedded rows.
        exports: formats in which the cell's result is exported.
        serving: streams at once at which the cell's result is served.
        steps: optimizer steps that are measured, in each repeat.
        warm_up: steps before them that are not.
        repeats: runs of the cell, each in a process of its own.
        packing: blocks of the cell's length are filled with whole rows.
        val_rows: rows held out, whose loss after the last step is a figure of the cell.
        seed: of rows, order and adapters.
        timeout_seconds: of each run, export or server.
        prompt_words: of a question to a server.
        answer_tokens: of each answer to it: it goes on where the model would end.
    """

    dataset: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    serving: tuple[int, ...] = ()
    steps: int = 10
    warm_up: int = 2
    repeats: int = 3
    packing: bool = True
    val_rows: int = 8
    seed: int = 42
    timeout_seconds: float = 3600.0
    prompt_words: int = 64
    answer_tokens: int = 32
