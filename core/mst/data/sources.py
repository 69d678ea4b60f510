"""From what --dataset and its like say to files: paths, globs, `#N`, and registered names."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mst.data.dataset_info import Registered, registered
from mst.data.records import ACCEPTED_SUFFIXES, kind_of
from mst.data.selection import Selection, split_spec
from mst.errors import DataError
from mst.seal.container.layout import SUFFIX

# What most data is named by.
OPTION = "--dataset"

# Lies beside data in most directories, and holds no rows.
_DOCUMENTS = re.compile(
    r"\..*|(readme|licen[cs]e|notice|changelog|citation)(\..*)?|dataset_infos?\.json|state\.json"
    r"|.*\.(md|rst|lock)",
    re.IGNORECASE,
)
_TRAIN = re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)", re.IGNORECASE)
_HELD_OUT = re.compile(r"(^|[^a-z])(test|valid|validation|val|dev|eval)([^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """What one --dataset argument names.

    Attributes:
        files: resolved, in the order in which they are read.
        selection: which of their rows are taken.
        registered: what dataset_info.json says about it; empty without one.
    """

    files: tuple[Path, ...]
    selection: Selection
    registered: Registered = field(default_factory=Registered)


def find_source(spec: str, dataset_info: str | None = None, option: str = OPTION) -> Source:
    """Return the files that one argument of --dataset, or of an option like it, names.

    Args:
        spec: a file, a directory, a glob or a name of `dataset_info`, also with `#N` or `#~N`.
        dataset_info: LLaMA-Factory's dataset_info.json, or its directory.
        option: that the user has typed.

    Raises:
        DataError: nothing is there, or something that holds no rows.
    """
    path, selection = _divided(spec)
    if dataset_info is not None:
        found = registered(dataset_info, path)
        if found is not None:
            if selection.rows is None and found.num_samples is not None:
                selection = Selection(found.num_samples)
            return Source(_files(str(found.path), option), selection, found)
        if not Path(path).expanduser().exists() and "/" not in path and not kind_of(Path(path)):
            _refuse_unregistered(dataset_info, path)
    return Source(_files(path, option), selection)


def absolute_spec(spec: str, dataset_info: str | None = None) -> str:
    """Return a --dataset argument that means the same from every working directory."""
    path, _ = _divided(spec)
    if dataset_info is not None and registered(dataset_info, path) is not None:
        return spec
    return str(Path(path).expanduser().absolute()) + spec[len(path) :]


def _divided(spec: str) -> tuple[str, Selection]:
    # A file may be called "notes#3".
    return (spec, Selection()) if Path(spec).expanduser().exists() else split_spec(spec)


def _files(text: str, option: str) -> tuple[Path, ...]:
    path = Path(text).expanduser()
    if path.is_dir():
        return tuple(each.resolve() for each in _inside(path, option))
    if path.exists():
        return (path.resolve(),)
    if glob.has_magic(text):
        found = sorted(glob.glob(str(path), recursive=True))
        files = tuple(Path(each).resolve() for each in found if Path(each).is_file())
        if not files:
            raise DataError(
                f"No data file matches {text}. Check the pattern; `**/` goes into directories."
            )
        return files
    raise DataError(f"No data file at {path}{_neighbours(path)}. Check the path.")


def _inside(directory: Path, option: str) -> list[Path]:
    """Return a directory's data files, those of its own directories too, sorted by path."""
    found = [
        each
        for each in sorted(directory.rglob("*"))
        if each.is_file()
        and not any(_DOCUMENTS.fullmatch(part) for part in each.relative_to(directory).parts)
    ]
    names = [str(each.relative_to(directory)) for each in found]
    foreign = [name for name in names if kind_of(Path(name)) is None]
    if foreign:
        raise DataError(
            f"{directory} holds files that are no data sets: {_shown(foreign)}. Pass the ones you "
            f"mean, for example {directory}/*.jsonl (accepted: {ACCEPTED_SUFFIXES})."
        )
    if not found:
        raise DataError(f"{directory} holds no {ACCEPTED_SUFFIXES} file. Pass another {option}.")
    twice = [name for name in names if name + SUFFIX in names]
    if twice:
        raise DataError(
            f"{directory} holds {twice[0]} and its encrypted copy {twice[0]}{SUFFIX}, and every row"
            " would be read twice. Move one of them away, or pass the one you mean."
        )
    held_out = [name for name in names if _HELD_OUT.search(name) and not _TRAIN.search(name)]
    if held_out and any(_TRAIN.search(name) for name in names):
        others = ", and the others as --val-dataset" if option == OPTION else ""
        raise DataError(
            f"{directory} holds files to train on and files to test with ({_shown(held_out)}); "
            f"training on both would spoil the test. Pass the ones you mean as a path or a glob"
            f"{others}."
        )
    return found


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _neighbours(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (there is no directory {parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=3)
    return f" (nearest there: {', '.join(near)})" if near else ""


def _refuse_unregistered(dataset_info: str, name: str) -> None:
    from mst.data.dataset_info import names

    known = names(dataset_info)
    near = difflib.get_close_matches(name, known, n=3) or known[:5]
    raise DataError(
        f"'{name}' is neither a file nor a data set of {dataset_info} (nearest there: "
        f"{', '.join(near) or 'none'}). Mend the name, or pass a path."
    )
