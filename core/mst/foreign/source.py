"""Their file to settings: YAML, JSON, or a script with the command that trains."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mst.errors import UsageError
from mst.foreign.command import Command, find_command
from mst.seal.supply.yaml_text import load_yaml

# The largest of 800 examples and dumped arguments of the four tools has 40 KB.
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """What a file says.

    Attributes:
        values: their settings, keys with underscores.
        tool: the tool, where the file names its program.
        command: the tool's subcommand, where the file names it.
        environment: variables that are set for the program.
        launcher: what was given to torchrun, accelerate or deepspeed, with underscores.
    """

    values: dict[str, Any]
    tool: str | None = None
    command: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    launcher: dict[str, Any] = field(default_factory=dict)


def read_source(path: Path) -> Source:
    """Return what a configuration file, or a script that trains, says.

    Raises:
        UsageError: it can't be read, or holds neither settings nor one command that trains.
    """
    text = _text(path)
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        command = find_command(text, path)
        if command is not None:
            return _with_config(command, path)
        if path.suffix.lower() in (".sh", ".bash"):
            raise UsageError(
                f"{path} holds no command that trains. Found none of swift, llamafactory-cli,"
                " axolotl, trl, torchrun or accelerate launch with a training script. Give the"
                " file with the options, or the script that starts the training."
            )
    return _settings(_mapping(text, path))


def _text(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            raise UsageError(
                f"{path} has {path.stat().st_size:,} bytes; a configuration has at most"
                f" {MOST_BYTES:,}. Give the file with the options, not data or a log."
            )
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}. mst config import takes a YAML or JSON file"
            " of another trainer, or a script with its command."
        ) from None
    except UnicodeDecodeError:
        raise UsageError(
            f"{path} is not UTF-8 text. mst config import takes a YAML or JSON file of another"
            " trainer, or a script with its command."
        ) from None
    if not text.strip() or "\0" in text:
        found = "is empty" if not text.strip() else "is binary"
        raise UsageError(f"{path} {found}. Give a file with the options of another trainer.")
    return text


def _mapping(text: str, path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML or JSON text holds; errors never quote the text."""
    try:
        loaded = json.loads(text) if text.lstrip().startswith("{") else _yaml(text, path)
    except json.JSONDecodeError as error:
        if path.suffix.lower() == ".json":
            raise UsageError(
                f"{path} line {error.lineno} is not JSON: {error.msg}. Mend the line, or give the"
                " tool's YAML."
            ) from None
        loaded = _yaml(text, path)
    except RecursionError:
        raise UsageError(
            f"{path} nests values too deeply to be a configuration. Give the file with the"
            " options, as lines of `key: value`."
        ) from None
    if not isinstance(loaded, dict):
        kind = "nothing" if loaded is None else f"a {type(loaded).__name__}"
        raise UsageError(
            f"{path} holds {kind}; expected options as lines of `key: value`, or as a JSON object."
        )
    return loaded


def _yaml(text: str, path: Path) -> Any:
    import yaml

    try:
        return load_yaml(text, path)
    except RecursionError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"{path}{place} is not YAML, or holds a value that YAML can't read. Mend it; a script"
            " is read as such when its name ends in .sh."
        ) from None


def _settings(loaded: dict[str, Any]) -> Source:
    """Return settings with their keys spelt one way, and the variables that stand among them."""
    values = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    environment: dict[str, str] = {}
    for key in ("ENV", "env"):  # ms-swift's, TRL's
        if isinstance(values.get(key), dict):
            environment |= {str(k): str(v) for k, v in values.pop(key).items()}
    return Source(values, environment=environment)


def _with_config(command: Command, path: Path) -> Source:
    """Return a command's settings, over those of the file that it names."""
    values, environment = dict(command.values), dict(command.environment)
    if command.config is not None:
        there = Path(command.config)
        there = there if there.is_file() else path.parent / there
        if there.suffix.lower() not in (".yaml", ".yml", ".json"):
            raise UsageError(
                f"the command in {path} takes its options from a file that is neither YAML nor"
                " JSON. Import that file."
            )
        inner = _settings(_mapping(_text(there), there))
        values, environment = {**inner.values, **values}, {**inner.environment, **environment}
    return Source(values, command.tool, command.name, environment, dict(command.launcher))
