"""A cell of the matrix: one way to train one model, and the command line that does it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mst.bench.matrix import AUTO, DEFAULT_MODEL, Matrix
from mst.demo import demo_data
from mst.request import fields

# How often a cell is measured, and what is done with its result, make it no other cell.
_NOT_IDENTITY = frozenset(
    {
        "method", "repeats", "timeout_seconds", "exports", "serving", "prompt_words",
        "answer_tokens",
    }
)  # fmt: skip
# No checkpoint is written while steps are timed but the last one's.
_NEVER = 10**6


@dataclass(frozen=True)
class Cell:
    """One cell; whole in itself, so that any machine can measure it. Attributes as `Matrix`.

    Attributes:
        model: that is trained.
        method: its name.
        options: of `mst train`: those of the method, and of all cells.
        length: tokens of a row or block.
        batch: rows or blocks a micro-batch, or "auto".
        device: as `--device` takes it.
    """

    model: str
    method: str
    options: Mapping[str, str]
    length: int
    batch: str
    device: str
    dataset: tuple[str, ...] = ()
    steps: int = 10
    warm_up: int = 2
    repeats: int = 3
    packing: bool = True
    val_rows: int = 8
    seed: int = 42
    timeout_seconds: float = 3600.0
    exports: tuple[str, ...] = ()
    serving: tuple[int, ...] = ()
    prompt_words: int = 64
    answer_tokens: int = 32

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that are the same for the same cell everywhere."""
        kept = {name: value for name, value in asdict(self).items() if name not in _NOT_IDENTITY}
        text = json.dumps(kept, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def devices(self) -> int:
        """How many devices its options ask for; 1 where the plan decides."""
        return int(self.options.get("nproc_per_node", "1"))


def cells_of(matrix: Matrix) -> tuple[Cell, ...]:
    """Return the product of the matrix's axes, cells of one model and device together."""
    axes = itertools.product(
        matrix.devices, matrix.models, matrix.methods, matrix.lengths, matrix.batches
    )
    return tuple(
        Cell(
            model=model,
            method=method.name,
            options={**matrix.options, **method.options},
            length=length,
            batch=batch,
            device=device,
            dataset=matrix.dataset,
            steps=matrix.steps,
            warm_up=matrix.warm_up,
            repeats=matrix.repeats,
            packing=matrix.packing,
            val_rows=matrix.val_rows,
            seed=matrix.seed,
            timeout_seconds=matrix.timeout_seconds,
            exports=matrix.exports,
            serving=matrix.serving,
            prompt_words=matrix.prompt_words,
            answer_tokens=matrix.answer_tokens,
        )
        for device, model, method, length, batch in axes
    )


def request_values(cell: Cell) -> dict[str, str]:
    """Return the options of `mst train` that a cell comes to, by name, as text."""
    values = {
        "device": cell.device,
        "max_length": str(cell.length),
        "packing": str(cell.packing).lower(),
        "truncation_strategy": "right",
        "max_steps": str(cell.warm_up + cell.steps),
        "val_size": str(cell.val_rows),
        "seed": str(cell.seed),
        "logging_steps": "1",
        "eval_steps": str(_NEVER),
        "save_steps": str(_NEVER),
        # The same rate in each step, so that losses of runs with other lengths can be compared.
        "lr_scheduler_type": "constant",
        "warmup_ratio": "0",
        "on_oom": "stop",
        "label_accuracy": "off",
        **cell.options,
    }
    if cell.model != DEFAULT_MODEL:
        values["model"] = cell.model
    if cell.batch != AUTO:
        values["per_device_train_batch_size"] = cell.batch
        values["gradient_accumulation_steps"] = "1"
    return values


def rows_of(cell: Cell) -> tuple[str, ...]:
    """Return the data of a cell, as `--dataset` takes it.

    The embedded rows are named, for without a name they come with the demo's learning rate, which
    is one for LoRA.
    """
    return cell.dataset or demo_data()[:1]


def train_arguments(cell: Cell, run: Path) -> list[str]:
    """Return the arguments of `mst train` for one repeat of a cell.

    Args:
        cell: that is measured.
        run: the run directory.
    """
    found = ["--output-dir", str(run), "--dataset", *rows_of(cell)]
    known = fields()
    for name, value in request_values(cell).items():
        several = isinstance(known[name].default, tuple)
        found += [f"--{name.replace('_', '-')}", *(value.split(",") if several else [value])]
    return found
