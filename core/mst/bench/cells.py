"""A cell of the matrix: one way to train one model, and the command line that does it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mst.bench.matrix import AUTO, DEFAULT_MODEL, Matrix
from mst.bench.procedure import Procedure
from mst.demo import demo_data
from mst.request import fields

# How often a cell is measured, and what is done with its result, make it no other cell.
_NOT_IDENTITY = frozenset(
    {
        "method", "repeats", "timeout_seconds", "exports", "serving", "prompt_words",
        "answer_tokens", "procedure",
    }
)  # fmt: skip
# No checkpoint is written while steps are timed but the last one's.
_NEVER = 10**6


@dataclass(frozen=True)
class Cell:
    """One cell; whole in itself, so that any machine can measure it.

    Attributes:
        model: that is trained.
        method: its name.
        options: of `mst train`: those of the method, and of all cells.
        length: tokens of a row or block.
        batch: rows or blocks a micro-batch, or "auto".
        device: as `--device` takes it.
        peer: that trains it in the place of mst, as `--peer` names it; "" for mst.
        procedure: how it is measured.
    """

    model: str
    method: str
    options: Mapping[str, str]
    length: int
    batch: str
    device: str
    peer: str = ""
    procedure: Procedure = field(default_factory=Procedure)

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that are the same for the same cell everywhere."""
        own = asdict(self)
        flat = {**own, **own["procedure"]}
        kept = {name: value for name, value in flat.items() if name not in _NOT_IDENTITY}
        if not self.peer:  # as it was before there were peers
            del kept["peer"]
        text = json.dumps(kept, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def devices(self) -> int:
        """How many devices its options ask for; 1 where the plan decides."""
        return int(self.options.get("nproc_per_node", "1"))


def cells_of(matrix: Matrix, peers: Iterable[str] = ()) -> tuple[Cell, ...]:
    """Return the product of the matrix's axes, cells of one model and device together.

    Args:
        matrix: what is measured.
        peers: that train each cell too; such a cell follows the one of mst.
    """
    axes = itertools.product(
        matrix.devices, matrix.models, matrix.methods, matrix.lengths, matrix.batches
    )
    cells = [
        Cell(
            model=model,
            method=method.name,
            options={**matrix.options, **method.options},
            length=length,
            batch=batch,
            device=device,
            procedure=matrix.procedure,
        )
        for device, model, method, length, batch in axes
    ]
    names = tuple(peers)
    return tuple(one for each in cells for one in (each, *(of_peer(each, name) for name in names)))


def of_peer(cell: Cell, peer: str) -> Cell:
    """Return the cell as a peer trains it; what is made of its result is none of its figures."""
    return replace(cell, peer=peer, procedure=replace(cell.procedure, exports=(), serving=()))


def request_values(cell: Cell) -> dict[str, str]:
    """Return the options of `mst train` that a cell comes to, by name, as text."""
    how = cell.procedure
    values = {
        "device": cell.device,
        "max_length": str(cell.length),
        "packing": str(how.packing).lower(),
        "truncation_strategy": "right",
        "max_steps": str(how.warm_up + how.steps),
        "val_size": str(how.val_rows),
        "seed": str(how.seed),
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
    return cell.procedure.dataset or demo_data()[:1]


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
