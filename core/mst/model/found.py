"""What models lie on this machine, from their configurations and headers: no torch, no weights."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mst import serial
from mst.errors import ModelError, MstError
from mst.model.facts import ModelFacts, on_disk, read_kept_facts
from mst.model.files import read_config, read_header, weight_files
from mst.model.locate import DEFAULT_LICENCE, default_model
from mst.model.places import EMBEDDED, models_in, places
from mst.seal.supply.model_files import only_pickle_message
from mst.seal.supply.standing import HashState, hash_state

# Of a model card no more is read: its licence stands in its first lines.
_CARD_BYTES = 64 << 10
_NAME = r"[A-Za-z0-9][A-Za-z0-9.+_ -]{0,60}"
_LICENCE = re.compile(rf"^license:\s*[\"']?({_NAME})[\"']?\s*$", re.MULTILINE)
_LICENCE_NAME = re.compile(rf"^license_name:\s*[\"']?({_NAME})[\"']?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class FoundModel:
    """A model that lies here.

    Attributes:
        name: as `--model` takes it; None is `--model`'s default.
        path: its directory, or a GGUF file.
        place: what kind of place it lies in, as `mst.model.places` names them.
        bytes: of the files that are read of it.
        parameters: weights; None when they can't be counted without converting it.
        model_type: transformers' name of the architecture; "" when unknown.
        dtype: that most weights have, as safetensors names it; "" when unknown.
        context: tokens; None when unknown.
        licence: as its card or configuration names it; "" when neither does.
        hashes: whether its files are listed with hashes, and when they were last compared.
        problem: why it can't be used; "" when it can.
        facts: its shape; None when only transformers' class knows, which is slow to ask.
    """

    name: str
    path: str
    place: str
    bytes: int
    parameters: int | None = None
    model_type: str = ""
    dtype: str = ""
    context: int | None = None
    licence: str = ""
    hashes: HashState = field(default_factory=HashState)
    problem: str = ""
    facts: ModelFacts | None = field(default=None, repr=False)


def found_models(
    environ: Mapping[str, str], models_dir: Sequence[str] = ()
) -> tuple[FoundModel, ...]:
    """Return the models in the local places, in the order of these; the embedded one is last.

    What can't be used is among them, with its reason. Read are directories, configurations, cards
    and the headers of weight files: a few milliseconds a model.

    Args:
        environ: as `mst.model.places.places` reads it.
        models_dir: directories that `--models-dir` names.
    """
    found: dict[Path, FoundModel] = {}
    for place in places(models_dir, environ):
        for name, path in models_in(place):
            key = path.resolve()
            if key not in found:
                found[key] = describe(name, path, place.kind)
    with suppress(MstError):  # the package that carries it isn't installed
        source = default_model()
        embedded = replace(describe(source.name, source.path, EMBEDDED), licence=DEFAULT_LICENCE)
        found.setdefault(source.path.resolve(), embedded)
    return tuple(found.values())


def describe(name: str, path: Path, place: str) -> FoundModel:
    """Return what there is to say of one model; what stands in the way becomes its `problem`."""
    shown = _shown(name)
    if path.suffix.lower() == ".gguf":
        return _gguf(shown, path, place)
    known: dict[str, Any] = {"bytes": _bytes_of(path), "hashes": hash_state(path)}
    try:
        config = read_config(path)
        known |= _of_config(path, config)
        files = weight_files(path)
        headers: dict[str, Any] = {}
        for each in files:
            headers |= read_header(each)
        if not headers:
            raise ModelError(f"{path}: its weights hold no tensor. Copy it from the source again.")
        facts = read_kept_facts(path, config, headers)
        known["parameters"] = (
            sum(math.prod(each["shape"]) for each in headers.values())
            if facts is None
            else facts.parameters
        )
        known["dtype"] = on_disk(headers)["dtype"]
        known["facts"] = facts
    except ModelError as error:
        known["problem"] = str(error)
        with suppress(OSError):
            if only_pickle_message(path) and not list(path.glob("*.safetensors")):
                known["problem"] = only_pickle_message(path)
    except OSError as error:
        known["problem"] = f"cannot read {path}: {error.strerror}."
    known["problem"] = _shown(known.get("problem", ""))
    return FoundModel(name=shown, path=str(path), place=place, **known)


def _shown(text: str) -> str:
    """Return a text without what would steer a terminal."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _of_config(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    kind = config.get("model_type")
    context = config.get("max_position_embeddings")
    return {
        "model_type": kind if isinstance(kind, str) and kind.isprintable() else "",
        "context": context if isinstance(context, int) else None,
        "licence": _licence(path, config),
    }


def _licence(path: Path, config: Mapping[str, Any]) -> str:
    """Return a licence's name from the head of a card, or from a configuration; "" for none."""
    head = ""
    with suppress(OSError):
        with (path / "README.md").open("rb") as file:
            text = file.read(_CARD_BYTES).decode("utf-8", "replace")
        if text.startswith("---"):
            head = text[3:].partition("\n---")[0]
    match = _LICENCE.search(head)
    if match is not None and match[1].strip().lower() == "other":
        match = _LICENCE_NAME.search(head) or match
    if match is not None:
        return match[1].strip()
    named = config.get("license")
    return named if isinstance(named, str) and re.fullmatch(_NAME, named) else ""


def _bytes_of(path: Path) -> int:
    total = 0
    with suppress(OSError):
        for each in os.scandir(path):
            with suppress(OSError):
                total += each.stat().st_size if each.is_file() else 0
    return total


def _gguf(name: str, path: Path, place: str) -> FoundModel:
    """Return what is known of a GGUF file: all, once it was converted; else its size."""
    from mst.model.gguf import kept_copy

    size = path.stat().st_size
    copy = kept_copy(path)
    if copy is None:
        return FoundModel(name, str(path), place, size, hashes=hash_state(path))
    known = describe(name, copy, place)
    return FoundModel(
        name, str(path), place, size, known.parameters, known.model_type, known.dtype,
        known.context, known.licence, hash_state(path), known.problem, known.facts,
    )  # fmt: skip


def to_plain(model: FoundModel) -> dict[str, Any]:
    """Return a model as JSON holds it, without the list of its layers."""
    plain = serial.to_json(model)
    del plain["facts"]
    return plain
