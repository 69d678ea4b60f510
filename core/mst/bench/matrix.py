"""The matrix file of `mst bench`: what is to be measured, checked before anything runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mst.bench.procedure import Procedure
from mst.data.refusals import shown_names
from mst.errors import UsageError

T = TypeVar("T", str, int)

DEFAULT_MODEL = "default"
PROCEDURE = tuple(each.name for each in dataclasses.fields(Procedure))
AUTO = "auto"
# Each is what `mst train` would be given; the ZeRO stages cut full tuning over several devices.
METHODS: dict[str, dict[str, str]] = {
    "lora": {"tuner": "lora"},
    "qlora": {"tuner": "qlora"},
    "full": {"tuner": "full"},
    "zero1": {"tuner": "full", "deepspeed": "zero1"},
    "zero2": {"tuner": "full", "deepspeed": "zero2"},
    "zero3": {"tuner": "full", "deepspeed": "zero3"},
}
# What a key of the matrix decides for every cell, or what would make it another command.
SET_BY = {
    "model": "models", "dataset": "dataset", "max_length": "lengths", "device": "devices",
    "per_device_train_batch_size": "batches", "gradient_accumulation_steps": "batches",
    "max_steps": "steps and warm_up", "num_train_epochs": "steps and warm_up",
    "packing": "packing", "val_size": "val_rows", "seed": "seed", "output_dir": "--output-dir",
    "logging_steps": "nothing: every step is read", "save_steps": "nothing",
    "eval_steps": "nothing", "on_oom": "nothing: a cell that runs out of memory is marked",
    "resume": "nothing", "jail": "--jail", "jail_reason": "--jail-reason",
    "early_stopping_patience": "nothing", "label_accuracy": "nothing",
    "allow_net": "nothing: a cell is measured on one machine",
    **dict.fromkeys(("nnodes", "node_rank", "master_addr", "master_port"), "nothing: see devices"),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: as the table shows it.
        options: of `mst train`, as text.
    """

    name: str
    options: Mapping[str, str]


@dataclass(frozen=True)
class Matrix:
    """What is measured: every model with every method, length, batch and device.

    Attributes:
        name: of the results.
        models: as `--model` takes them; "default" is the embedded one.
        methods: ways to train.
        lengths: tokens of a row, or of a block where rows are packed.
        batches: rows or blocks a micro-batch, with one micro-batch a step; "auto" is the plan's.
        devices: as `--device` takes them.
        options: further ones of `mst train`, of every cell.
        procedure: how each cell is measured; in the file its keys stand beside the others.
    """

    name: str = "bench"
    models: tuple[str, ...] = (DEFAULT_MODEL,)
    methods: tuple[Method, ...] = (Method("lora", METHODS["lora"]),)
    lengths: tuple[int, ...] = (512,)
    batches: tuple[str, ...] = (AUTO,)
    devices: tuple[str, ...] = (AUTO,)
    options: Mapping[str, str] = field(default_factory=dict)
    procedure: Procedure = field(default_factory=Procedure)


# `mst bench quick`: what this machine does with the embedded model, in minutes.
QUICK = Matrix(
    name="quick",
    methods=(Method("lora", METHODS["lora"]), Method("full", METHODS["full"])),
    lengths=(256,),
    batches=("2",),
    procedure=Procedure(
        exports=("merged",),
        serving=(1, 4),
        steps=4,
        warm_up=1,
        repeats=2,
        timeout_seconds=150.0,
        prompt_words=32,
        answer_tokens=16,
    ),
)
# After which quick begins no further repeat, export or server.
QUICK_SECONDS = 200.0


def read_matrix(path: Path) -> Matrix:
    """Return the matrix in a YAML file.

    Raises:
        UsageError: it can't be read, has an unknown key (names the nearest), a value of another
            kind or out of range, an axis without a value, or the same cell twice.
    """
    values = _mapping(path)
    known = keys()
    for key in values:
        if key not in known:
            raise UsageError(
                f"{path}: unknown key {shown_names([str(key)])}.{_nearest(key, known)} A matrix has"
                f" {', '.join(known)} (docs/bench.md)."
            )
    readers: dict[str, Callable[[str, Any], Any]] = {
        "name": _name, "models": _texts, "dataset": _optional_texts, "methods": _methods,
        "lengths": _wholes(2), "batches": _batches, "devices": _texts, "exports": _optional_texts,
        "serving": _optional_wholes, "steps": _whole(1), "warm_up": _whole(0),
        "repeats": _whole(1), "packing": _flag, "val_rows": _whole(0), "seed": _whole(0),
        "timeout_seconds": _seconds, "prompt_words": _whole(1), "answer_tokens": _whole(1),
        "options": _options,
    }  # fmt: skip
    found = {key: readers[key](f"{path}: {key}", value) for key, value in values.items()}
    own = {key: value for key, value in found.items() if key not in PROCEDURE}
    procedure = Procedure(**{key: value for key, value in found.items() if key in PROCEDURE})
    matrix = Matrix(**own, procedure=procedure)
    check(matrix, str(path))
    return matrix


def keys() -> list[str]:
    """Return the keys that a matrix file may have."""
    own = [each.name for each in dataclasses.fields(Matrix) if each.name != "procedure"]
    return [*own, *PROCEDURE]


def check(matrix: Matrix, shown: str) -> None:
    """Make sure that there is something to measure, and nothing twice.

    Raises:
        UsageError: otherwise.
    """
    from mst.bench.cells import cells_of

    seen: dict[str, str] = {}
    cells = cells_of(matrix)
    for each in cells:
        words = f"{each.model}, {each.method}, {each.length}, {each.batch}, {each.device}"
        if each.id in seen:
            raise UsageError(
                f"{shown}: the cell ({words}) is there twice, first as ({seen[each.id]}). Each cell"
                " is measured once; raise repeats to measure it more often."
            )
        seen[each.id] = words


def _mapping(path: Path) -> dict[str, Any]:
    from mst.cli.options import yaml_in

    advice = "`mst bench` takes a YAML file, or one of quick, show, merge and peak."
    loaded = yaml_in(path, "the matrix", advice)
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} holds no matrix; expected lines of `key: value` (docs/bench.md).")
    found: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name in found:
            raise UsageError(f"{path}: {name} is there twice, with - and with _. Leave one out.")
        found[name] = value
    return found


def _nearest(name: str, known: Sequence[str]) -> str:
    from mst.cli.options import nearest

    return nearest(name, known)


def _text(shown: str, value: Any) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool) or value == "":
        raise UsageError(f"{shown} takes a text, not {value!r}.")
    return str(value)


def _name(shown: str, value: Any) -> str:
    """Return the name of the results, which is a part of their directory's."""
    text = _text(shown, value)
    if "/" in text or text.startswith("."):
        raise UsageError(
            f"{shown} is a part of a directory's name, so it has no / and begins with no dot;"
            f" found {text!r}."
        )
    return text


def _list(shown: str, value: Any) -> list[Any]:
    items = value if isinstance(value, list) else [value]
    if value is None or not items:
        raise UsageError(
            f"{shown} is empty, so the matrix has no cell. Give it a value, or leave the key out"
            " for the usual one."
        )
    return items


def _texts(shown: str, value: Any) -> tuple[str, ...]:
    return tuple(_text(shown, each) for each in _list(shown, value))


def _optional_texts(shown: str, value: Any) -> tuple[str, ...]:
    """Return what may be left empty: nothing is exported then."""
    return () if value in (None, []) else _unique(shown, _texts(shown, value))


def _unique(shown: str, values: tuple[T, ...]) -> tuple[T, ...]:
    for place, each in enumerate(values):
        if each in values[:place]:
            raise UsageError(f"{shown} has {each} twice.")
    return values


def _whole(least: int) -> Callable[[str, Any], int]:
    def read(shown: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"{shown} takes a whole number from {least} on, not {value!r}.")
        return value

    return read


def _wholes(least: int) -> Callable[[str, Any], tuple[int, ...]]:
    def read(shown: str, value: Any) -> tuple[int, ...]:
        return tuple(_whole(least)(shown, each) for each in _list(shown, value))

    return read


def _optional_wholes(shown: str, value: Any) -> tuple[int, ...]:
    return () if value in (None, []) else _unique(shown, _wholes(1)(shown, value))


def _batches(shown: str, value: Any) -> tuple[str, ...]:
    return tuple(
        AUTO if each == AUTO else str(_whole(1)(f"{shown} (rows, or auto)", each))
        for each in _list(shown, value)
    )


def _flag(shown: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{shown} takes true or false, not {value!r}.")
    return value


def _seconds(shown: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise UsageError(f"{shown} takes seconds above 0, not {value!r}.")
    return float(value)


def _methods(shown: str, value: Any) -> tuple[Method, ...]:
    return tuple(_method(shown, each) for each in _list(shown, value))


def _method(shown: str, value: Any) -> Method:
    """Return a method: its name, or its options with a name."""
    if isinstance(value, dict):
        options = _options(shown, {key: one for key, one in value.items() if key != "name"})
        words = ", ".join(f"{key}={one}" for key, one in options.items())
        return Method(_text(shown, value.get("name", words)), options)
    name = _text(shown, value)
    if name not in METHODS:
        raise UsageError(
            f"{shown}: no method is called {name!r}.{_nearest(name, list(METHODS))} There are"
            f" {', '.join(METHODS)}; another is written as its options, such as"
            " {name: r64, tuner: lora, lora_rank: 64}."
        )
    return Method(name, METHODS[name])


def _options(shown: str, value: Any) -> dict[str, str]:
    """Return options of `mst train` as the text of their flags."""
    from mst.cli.options import convert, spelled
    from mst.request import alias_names, fields

    if not isinstance(value, dict):
        raise UsageError(f"{shown} takes lines of `option: value`, not {value!r}.")
    found: dict[str, str] = {}
    aliases = alias_names()
    for key, one in value.items():
        spelt = str(key).replace("-", "_")
        name = aliases.get(spelt, spelt)
        if name not in fields():
            raise UsageError(
                f"{shown}: unknown option {key!r}.{_nearest(spelt, list(fields()))}"
                " `mst train --help` lists them."
            )
        if name in SET_BY:
            raise UsageError(f"{shown}: {key} can't be set here; it is set by {SET_BY[name]}.")
        if one is None:
            raise UsageError(f"{shown}: {key} has no value. Give it one, or leave it out.")
        found[name] = spelled(convert(name, one, f"{shown}: {key}"))
    return found
