"""What in a model directory may be read: plain files of its own, and no names of code."""

from __future__ import annotations

import json
import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mst.errors import ModelError

# The largest tokenizer.json known to us has 34 MB (Gemma 3), the largest config.json some hundred
# kilobytes. A file beyond these is made to fill a memory.
MOST_CONFIG_BYTES = 16 << 20
MOST_TOKENIZER_BYTES = 512 << 20
# serde_json, which reads tokenizer.json, stops at 128 levels.
MOST_LEVELS = 100
_LARGE = ("tokenizer.json", "vocab.json", "model.safetensors.index.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What a model is copied without, beside its pickles: nothing of mst reads it.
PROGRAMS = (".py", ".pyc", ".so", ".sh")
ARCHIVES = (
    ".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z",
    ".rar",
)  # fmt: skip
# Fields that have led transformers to code although it was told to trust none: CVE-2026-4372
# (5.0 to 5.2) and CVE-2026-5241 (LightGlue, 5.2). No checkpoint needs them: transformers writes
# none.
_INTERNAL = ("_attn_implementation_internal", "_experts_implementation_internal")
# Fields that may name a kernel of a hub ("owner/name", or "owner/name:layer") to be downloaded.
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_UNPACK = (
    "Unpack it yourself into a new directory and give that: mst opens no archive, so that none can"
    " write outside of it."
)


def check_model_files(directory: Path) -> None:
    """Make sure that a model directory can be read without running or reading anything else.

    Looked at are the names in it and its JSON files; no weight is read. Files with code (`*.py`)
    and pickles may lie there: nothing of mst reads them.

    Raises:
        ModelError: a link leads out of the directory, a file is no plain file or has a name that
            can't be shown, a JSON file is oversized, too deep or damaged, or names code that a
            library would load.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise ModelError(f"cannot look into {directory}: {error.strerror}.") from None
    for name in names:
        path = directory / name
        if not name.isprintable():  # it would steer the terminal that shows an error
            raise ModelError(f"{directory} holds a file with the name {name!a}. Remove it.")
        _check_kind(directory, path)
        if not (path.is_file() and name.endswith(".json")):
            continue
        if name not in _LARGE:
            _check_names(path, read_bounded_json(path))
        elif path.stat().st_size > MOST_TOKENIZER_BYTES:
            raise ModelError(_oversized(path, MOST_TOKENIZER_BYTES))


def check_adapter_files(directory: Path, weights: str = "adapter_model.safetensors") -> None:
    """Make sure that an adapter directory holds a LoRA in safetensors, and names no code.

    Args:
        directory: of the adapter.
        weights: name of their file; encrypted runs have another one.

    Raises:
        ModelError: it doesn't; says what to do.
    """
    check_model_files(directory)
    if not (directory / weights).is_file():
        raise ModelError(only_pickle_message(directory) or f"{directory} has no {weights}.")
    config = read_bounded_json(directory / "adapter_config.json")
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ModelError(
            f"{directory}/adapter_config.json is of peft_type {str(kind)[:40]!r}; mst loads LORA."
        )
    if config.get("megatron_config"):
        # PEFT imports the module that `megatron_core` names.
        raise ModelError(
            f"{directory}/adapter_config.json names a module to import (megatron_config). Mst loads"
            " plain LoRA only: train the adapter again, or remove the field if you know its source."
        )


def refuse_archive(path: Path, typed: str) -> None:
    """Raise ModelError when a file is an archive.

    Args:
        path: a file.
        typed: how it was named: an option and its value, say.
    """
    if path.name.lower().endswith(ARCHIVES):
        raise ModelError(f"{typed} is an archive. {_UNPACK}")


def pickles_of(directory: Path) -> tuple[Path, ...]:
    """Return the files in a directory that torch would unpickle, by name."""
    return tuple(
        each
        for each in sorted(directory.iterdir())
        if each.suffix.lower() in PICKLES and each.name != "training_args.bin" and each.is_file()
    )


def only_pickle_message(directory: Path) -> str:
    """Return why weights that are only pickled are refused, and the command that converts; "" when
    there are none.
    """
    found = pickles_of(directory)
    if not found:
        return ""
    return (
        f"{directory} holds its weights as {found[0].name} only: a pickle, which can run code when"
        " it is read, so mst never loads it. Convert it, which runs nothing of it:"
        f" mst models convert {shlex.quote(str(directory))}"
        f" --output {shlex.quote(directory.name + '-safetensors')}"
    )


def read_bounded_json(path: Path) -> Any:
    """Return what a JSON file of a model holds.

    Raises:
        ModelError: it is oversized, nested too deeply, or no JSON; no text of it is quoted.
    """
    most = MOST_TOKENIZER_BYTES if path.name in _LARGE else MOST_CONFIG_BYTES
    again = "Copy it again from the source."
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
        if len(raw) > most:
            raise ModelError(_oversized(path, most))
        value = json.loads(raw)
        if path.name not in _LARGE and _too_deep(value):
            raise RecursionError
        return value
    except RecursionError:
        raise ModelError(f"{path} nests values too deeply, as no such file does. {again}") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}.") from None
    except ValueError:
        raise ModelError(f"{path} is not valid JSON. {again}") from None


def _oversized(path: Path, most: int) -> str:
    size = f"{most >> 20} MiB"
    return f"{path} has more than {size}, as no such file has. Copy it again from the source."


def _too_deep(value: object) -> bool:
    level: list[object] = [value]
    for _ in range(MOST_LEVELS):
        level = [inner for each in level for inner in _children(each)]
        if not level:
            return False
    return True


def _children(value: object) -> Iterator[object]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (each for each in inner if isinstance(each, (dict, list)))


def _check_kind(directory: Path, path: Path) -> None:
    if path.is_symlink():
        _check_link(directory, path)
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # a broken link, which _check_link has refused, or a file that just went
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ModelError(
            f"{path} is no plain file, but a device, pipe or socket. Remove it: reading it may hang"
            " or answer with something else each time."
        )


def _check_link(directory: Path, path: Path) -> None:
    """Refuse a link that leads to a file that is not the model's.

    A link to `~/.ssh/id_ed25519` named `vocab.json` would be copied into what `mst merge` writes.
    Two places are the model's own: its directory, and for a snapshot in a hub's cache
    (`models--ORG--NAME/snapshots/REVISION`) the blobs beside it, which is that cache's layout.
    """
    home = directory.resolve()
    target = path.resolve()
    places = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        places.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(each) for each in places):
        raise ModelError(
            f"{path} is a link to {target}, outside of the model's directory, so it may show a file"
            " that is none of the model's. Replace it by the file itself: `cp --remove-destination"
            f" {target} {path}` if it belongs there."
        )
    if not target.exists():
        raise ModelError(f"{path} is a link to nothing. Copy the model again from the source.")


def _check_names(path: Path, value: object) -> None:
    """Refuse fields by which a library would load code or a hub's kernel."""
    for part in _mappings(value):
        for key in _INTERNAL:
            if part.get(key) is not None:
                raise ModelError(_names_code(path, key))
        if part.get("trust_remote_code"):
            raise ModelError(_names_code(path, "trust_remote_code"))
        for key, chosen in part.items():
            if key.lstrip("_") in _IMPLEMENTATIONS and _names_a_hub(chosen):
                raise ModelError(_names_code(path, key))


def _names_code(path: Path, key: str) -> str:
    return (
        f"{path} sets {key}, by which a model can make a library load code from elsewhere. mst runs"
        " no code that comes with a model, so it refuses this one. If you know where it came from,"
        " remove the field; else don't use the model."
    )


def _names_a_hub(chosen: object) -> bool:
    if isinstance(chosen, Mapping):
        return any(_names_a_hub(each) for each in chosen.values())
    return isinstance(chosen, str) and any(mark in chosen for mark in "/\\:@")


def _mappings(value: object) -> Iterator[Mapping[str, Any]]:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield each
        waiting += _children(each)
