"""Where models lie on this machine: directories of the user's, and the caches of two hubs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

OWN = "models"
HUGGING_FACE = "Hugging Face cache"
MODELSCOPE = "ModelScope cache"
EMBEDDED = "embedded"
# A directory with more entries than this holds something else than models.
_MOST_ENTRIES = 10_000


@dataclass(frozen=True)
class Place:
    """A directory in which models are looked for.

    Attributes:
        kind: `OWN`, `HUGGING_FACE` or `MODELSCOPE`.
        path: the directory, which need not be there.
        named_by: what leads to it: an option, a variable, or "default".
    """

    kind: str
    path: Path
    named_by: str


def places(models_dir: Sequence[str], environ: Mapping[str, str]) -> tuple[Place, ...]:
    """Return where models are looked for, in this order.

    Args:
        models_dir: directories that `--models-dir` names.
        environ: read for MST_MODELS (paths joined by ":"), XDG_DATA_HOME, MODELSCOPE_CACHE,
            HF_HOME, HF_HUB_CACHE, XDG_CACHE_HOME and HOME.
    """
    home = Path(environ.get("HOME", "/"))
    found = [Place(OWN, Path(each).expanduser(), "--models-dir") for each in models_dir]
    found += [
        Place(OWN, Path(each), "MST_MODELS")
        for each in environ.get("MST_MODELS", "").split(":")
        if each
    ]
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    found.append(Place(OWN, data / "mst" / "models", "default"))
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    named = "MODELSCOPE_CACHE" if environ.get("MODELSCOPE_CACHE") else "default"
    scope = Path(environ.get("MODELSCOPE_CACHE") or cache / "modelscope" / "hub")
    found += [
        Place(MODELSCOPE, each, named)
        for each in (scope, scope / "models", scope / "hub" / "models")
    ]
    hub, hub_home = environ.get("HF_HUB_CACHE"), environ.get("HF_HOME")
    named = "HF_HUB_CACHE" if hub else "HF_HOME" if hub_home else "default"
    path = Path(hub) if hub else Path(hub_home or cache / "huggingface") / "hub"
    return (*found, Place(HUGGING_FACE, path, named))


def models_home(models_dir: Sequence[str], environ: Mapping[str, str]) -> Path:
    """Return the directory that models are added to: the first of `places`."""
    return places(models_dir, environ)[0].path.absolute()


def candidates(name: str, place: Place) -> Iterator[Path]:
    """Yield where a model of this name or id would lie in a place."""
    if place.kind == HUGGING_FACE:
        yield from _snapshots(place.path / ("models--" + name.replace("/", "--")))
        return
    yield place.path / name
    if place.kind == MODELSCOPE:
        # modelscope writes a dot in a name as three underscores.
        yield place.path / name.replace(".", "___")
    else:
        yield place.path / name.split("/")[-1]


def models_in(place: Place) -> Iterator[tuple[str, Path]]:
    """Yield the name and the path of each model in a place: directories, and GGUF files.

    A place that isn't there, or can't be read, has none. Entries that begin with a dot are none:
    what is being added has such a name.
    """
    if place.kind == HUGGING_FACE:
        for path in _entries(place.path):
            if path.name.startswith("models--"):
                snapshot = next(filter(is_model, _snapshots(path)), None)
                if snapshot is not None:
                    yield path.name.removeprefix("models--").replace("--", "/"), snapshot
        return
    for path in _entries(place.path):
        if is_model(path):
            yield _shown(place, path.name), path
        elif os.path.isdir(path):  # unlike a Path's, False without the right to look
            for inner in _entries(path):
                if is_model(inner):
                    yield _shown(place, f"{path.name}/{inner.name}"), inner


def is_model(path: Path) -> bool:
    """Return whether a path looks like a model: a directory with config.json, or a GGUF file."""
    try:
        if path.suffix.lower() == ".gguf":
            return path.is_file()
        return (path / "config.json").is_file()
    except OSError:  # no right to look into it
        return False


def _shown(place: Place, name: str) -> str:
    return name.replace("___", ".") if place.kind == MODELSCOPE else name


def _entries(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as found:
            names = [each.name for each, _ in zip(found, range(_MOST_ENTRIES), strict=False)]
    except OSError:
        return []
    return [directory / each for each in sorted(names) if not each.startswith(".")]


def _snapshots(repository: Path) -> Iterator[Path]:
    # huggingface_hub's layout: models--ORG--NAME/refs/main names the snapshot.
    main = repository / "refs" / "main"
    with suppress(OSError):  # no right to look into it
        if main.is_file():
            yield repository / "snapshots" / main.read_text("utf-8", "replace").strip()
        elif (repository / "snapshots").is_dir():
            yield from sorted((repository / "snapshots").iterdir())
