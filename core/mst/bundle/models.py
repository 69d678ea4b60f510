"""Models of a bundle: copied file by file, hashed on the way, and no pickle among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mst.durable import copy_file
from mst.errors import BundleError, ModelError
from mst.model.locate import ModelSource, locate
from mst.seal.supply.model_files import PROGRAMS, only_pickle_message, pickles_of


@dataclass(frozen=True)
class ModelFiles:
    """What is copied of a model.

    Attributes:
        name: of its directory in the bundle.
        files: each by its path in that directory.
        left_out: names of files that mst reads nothing of: pickles, programs, hidden files.
        size: of all files, in bytes.
    """

    name: str
    files: Mapping[str, Path]
    left_out: tuple[str, ...]
    size: int


def find_models(asked: Sequence[str], environ: Mapping[str, str]) -> tuple[ModelFiles, ...]:
    """Return the files of each model that was named.

    Raises:
        ModelError: there is no such model, it holds no weights but pickles, or can't be read
            safely.
        BundleError: two have the same name.
    """
    found = tuple(_files(locate(each, (), environ)) for each in asked)
    names = [each.name for each in found]
    for name in names:
        if names.count(name) > 1:
            raise BundleError(f"two models are called {name}. Rename the directory of one.")
    return found


def _files(source: ModelSource) -> ModelFiles:
    name = source.name.split("/")[-1]
    if source.is_gguf:
        return ModelFiles(name, {source.path.name: source.path}, (), source.path.stat().st_size)
    pickles = set(pickles_of(source.path))
    if not any(source.path.glob("*.safetensors")):
        raise ModelError(
            only_pickle_message(source.path) or f"--model {source.path} holds no *.safetensors."
        )
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for path in sorted(source.path.rglob("*")):
        shown = path.relative_to(source.path).as_posix()
        if path.is_symlink() and (path.parent != source.path or not path.is_file()):
            raise ModelError(f"{path} is a link. Replace it by the file itself.")
        if not shown.isprintable() or "\\" in shown:
            raise ModelError(f"{source.path} holds a file with the name {shown!a}. Rename it.")
        if not path.is_file():
            continue
        hidden = any(part.startswith(".") for part in Path(shown).parts)  # .git, .cache
        if path in pickles or hidden or path.suffix.lower() in PROGRAMS:
            left_out.append(shown)
        else:
            files[shown] = path
    return ModelFiles(
        name, files, tuple(left_out), sum(each.stat().st_size for each in files.values())
    )


def copy_model(model: ModelFiles, place: Path) -> dict[str, str]:
    """Copy a model's files below `place`, and return the SHA-256 of what was read, by path there.

    Raises:
        OSError: a file can't be read or written.
    """
    found = {}
    for name, source in model.files.items():
        target = place / model.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        found[f"{model.name}/{name}"] = copy_file(source, target)
    return found
