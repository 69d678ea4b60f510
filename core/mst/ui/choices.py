"""What a run that the page starts may be: models and data by id, options of `TrainRequest` by name.

The page never names a path. Whatever an id stands for lies under a directory that the user named
when the page was started, or is a model that `mst models list` showed then.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mst.errors import UsageError
from mst.request import fields
from mst.ui.index import id_of
from mst.ui.job import Places

# Of what is found in a directory, and of what is looked at, so that a wrong one (such as /) ends
# soon.
_MOST, _MOST_LOOKED_AT = 1000, 20_000
_DEPTH = 3
_DATA = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_PACKED = (".gz", ".zst", ".xz", ".bz2")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
# Values that lead to a file, a host or a token, which the page does not name.
_ELSEWHERE = re.compile("PATH|FILE|DIR|URI|HOST|CIDR")
# What runs code, loosens the seal, joins other machines, or asks for a key at a terminal.
_NOT_FROM_A_PAGE = frozenset(
    {"jail", "jail_reason", "nnodes", "node_rank", "master_port", "encrypt_run", "resume"}
)


class StartRequest(BaseModel):
    """A run to start, as the page asks for it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=80)
    place: int = Field(default=0, ge=0)
    model: str | None = Field(default=None, max_length=64)
    dataset: list[str] = Field(default=[], max_length=20)
    val_dataset: list[str] = Field(default=[], max_length=20)
    options: dict[str, bool | int | float | str | list[str]] = Field(default={}, max_length=60)


@dataclass(frozen=True)
class Choice:
    """A model or a file of data that may be chosen; `name` is how a person knows it."""

    id: str
    name: str
    path: Path


def data_files(places: Sequence[str]) -> tuple[Choice, ...]:
    """Return the files of rows under the directories that were named for data."""
    return tuple(each for place in places for each in _under(Path(place), _is_data, _DEPTH))


def models(places: Places) -> tuple[Choice, ...]:
    """Return the models in the directories that were named for models, then the local ones."""
    found = [each for place in places.models for each in _under(Path(place), _is_model, 2)]
    ids = {each.id for each in found}
    local = [Choice(id_of(Path(each.path)), each.name, Path(each.path))
             for each in places.local_models]  # fmt: skip
    return (*found, *(each for each in local if each.id not in ids))


def _is_data(path: Path) -> bool:
    suffixes = [each.lower() for each in path.suffixes if each.lower() != ".mst"]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    # Encrypted files need a key, which a page does not ask for.
    encrypted = path.suffix.lower() == ".mst"
    return bool(suffixes) and suffixes[-1] in _DATA and not encrypted and os.path.isfile(path)


def _is_model(path: Path) -> bool:
    if path.suffix.lower() == ".gguf":
        return os.path.isfile(path)
    # Not Path.is_file, which raises where a directory is somebody else's alone.
    return os.path.isfile(path / "config.json")


def _under(place: Path, wanted: Callable[[Path], bool], depth: int) -> Iterator[Choice]:
    """Yield what is wanted below a directory, following no link out of it."""
    root = place.resolve()
    looked_at = islice(_walk(place, depth), _MOST_LOOKED_AT)
    inside = (path for path in looked_at if wanted(path) and path.resolve().is_relative_to(root))
    for path in islice(inside, _MOST):
        yield Choice(id_of(path), str(path.relative_to(place)), path)


def _walk(place: Path, depth: int) -> Iterator[Path]:
    try:
        inside = sorted(each for each in place.iterdir() if each.name[0] != ".")
    except OSError:
        return
    for each in inside:
        yield each
        if depth > 1 and not os.path.islink(each) and os.path.isdir(each):
            yield from _walk(each, depth - 1)


def allowed_options() -> dict[str, Any]:
    """Return the options of a training request that a page may set, by name."""
    return {
        name: each
        for name, each in fields().items()
        if name not in _NOT_FROM_A_PAGE and not _ELSEWHERE.search(each.metadata["metavar"])
    }


def run_directory(request: StartRequest, places: Places) -> Path:
    """Return where a run is to be made.

    Raises:
        UsageError: its name is no name of a directory, or one is there already.
    """
    if not _NAME.fullmatch(request.name):
        raise UsageError(
            "a run's name has letters, digits, '.', '-' and '_', 80 at most, and begins with"
            " neither '.' nor '-'. Choose another."
        )
    if request.place >= len(places.runs):
        raise UsageError("there is no such directory of runs. Load the page again.")
    path = Path(places.runs[request.place]) / request.name
    if path.exists() or path.is_symlink():
        raise UsageError(f"there is something called {request.name} already. Choose another name.")
    return path


def start_arguments(request: StartRequest, places: Places) -> tuple[str, ...]:
    """Return the command line, behind `mst`, that trains what is asked for.

    Raises:
        UsageError: a name, an id or a value that is not allowed or not there.
    """
    from mst.cli.options import convert, spelled

    arguments = ["train", f"--output-dir={run_directory(request, places)}"]
    if request.model is not None:
        known = {each.id: each.path for each in models(places)}
        arguments.append(f"--model={_known(known, request.model, 'model')}")
    files = {each.id: each.path for each in data_files(places.data)}
    for flag, asked in (("dataset", request.dataset), ("val-dataset", request.val_dataset)):
        if asked:
            paths = [str(_known(files, each, "file of data")) for each in asked]
            arguments += [f"--{flag}", *paths]
    allowed = allowed_options()
    for name, value in sorted(request.options.items()):
        if name not in allowed:
            raise UsageError(
                "an option was asked for that a page can't set, or that there isn't. Start the run"
                " in a terminal: `mst train --help` lists all."
            )
        flag = name.replace("_", "-")
        converted = convert(name, value, flag)
        items = converted if isinstance(converted, tuple) else (spelled(converted),)
        if isinstance(converted, (str, tuple)) and any(each.startswith("-") for each in items):
            raise UsageError(f"{flag}: a value begins with '-'. Leave that out.")
        if not isinstance(converted, tuple):
            arguments.append(f"--{flag}={items[0]}")
        elif items:
            # Behind "--flag=first" a second value would be the command's own argument: a file of
            # options, which may name any code and switch the jail off.
            arguments += [f"--{flag}", *items]
    return tuple(arguments)


def _known(known: dict[str, Path], asked: str, what: str) -> Path:
    if asked not in known:
        raise UsageError(f"there is no such {what} here. Load the page again.")
    return known[asked]
