"""From flags and a YAML file to a TrainRequest; unknown names are errors that name the nearest."""

from __future__ import annotations

import argparse
import difflib
import math
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mst.data.refusals import shown_names
from mst.errors import UsageError
from mst.quantities import size_bytes
from mst.request import TrainRequest, alias_names, fields
from mst.seal.supply.yaml_text import load_yaml, problem_of

# Of `--max-length`, as `mst plan` takes it: find the longest.
LONGEST = "max"
_MOST_YAML_BYTES = 1 << 20
TITLES = {
    "what": "what to train on what",
    "method": "method",
    "objective": "objective",
    "length": "how long",
    "data": "data",
    "optimizer": "optimizer",
    "privacy": "differential privacy",
    "memory": "precision and memory",
    "run": "logging, checkpoints, resume",
    "seal": "seal",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UsageError, and which suggests the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage, so that every error has one form."""
        raise UsageError(f"{self.prog}: {message}. `{self.prog} --help` lists what it takes.")


def nearest(name: str, known: Sequence[str]) -> str:
    """Return " Did you mean …?" for the closest known name, or ""."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {found[0]}?" if found else ""


def refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """Raise UsageError for arguments that `parse_known_args` did not take."""
    if not unknown:
        return
    known = [option for action in parser._actions for option in action.option_strings]
    flag = next((each for each in unknown if each.startswith("-")), unknown[0])
    name = flag.split("=")[0]
    if not name.startswith("-"):
        raise UsageError(
            f"{parser.prog}: unexpected argument {name!r}. Options start with --;"
            f" `{parser.prog} --help` lists them."
        )
    raise UsageError(
        f"{parser.prog}: unknown option {name}.{nearest(name, known)}"
        f" `{parser.prog} --help` lists the options."
    )


def _kind(annotation: object) -> tuple[type, bool]:
    """Return the element type of a field's annotation, and whether it is a list."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        inner = next(each for each in typing.get_args(annotation) if each is not type(None))
        return inner, False
    assert isinstance(annotation, type)
    return annotation, False


def _kinds() -> dict[str, tuple[type, bool]]:
    return {name: _kind(each) for name, each in typing.get_type_hints(TrainRequest).items()}


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add the positional YAML file and one flag for each field of TrainRequest."""
    parser.add_argument("config", nargs="?", metavar="YAML", help="options as keys; flags override")
    groups: dict[str, Any] = {}
    kinds = _kinds()
    for name, each in fields().items():
        meta = each.metadata
        group = groups.get(meta["group"])
        if group is None:
            group = groups[meta["group"]] = parser.add_argument_group(TITLES[meta["group"]])
        kind, many = kinds[name]
        flags = ["--" + name.replace("_", "-")]
        flags += ["--" + name] if "_" in name else []
        shown: Any = each.default
        if shown in (None, ()):
            text = meta["help"]
        else:
            value = ",".join(shown) if many else str(shown).lower() if kind is bool else shown
            text = f"{meta['help']} ({value})"
        keywords: dict[str, Any] = {"dest": name, "default": None, "help": text.replace("%", "%%")}
        if name == "resume":
            keywords |= {"nargs": "?", "const": "last"}
        if kind is bool:
            keywords |= {"nargs": "?", "const": "true"}
        if many:
            keywords |= {"nargs": "+"}
        if name == "allow_net":
            keywords |= {"action": "extend"}  # one option a network, as firewalls take them
        keywords["metavar"] = meta["metavar"] or ("|".join(meta["choices"]) or kind.__name__)
        group.add_argument(*flags, **keywords)
        hidden = [f"--{each}" for a in meta["aliases"] for each in {a, a.replace("_", "-")}]
        if hidden:
            keywords["help"] = argparse.SUPPRESS
            group.add_argument(*hidden, **keywords)


def _number(name: str, kind: type, value: object) -> Any:
    if isinstance(value, bool):
        raise UsageError(f"{name} takes a number, not {value}.")
    try:
        number = kind(str(value))
    except ValueError:
        raise UsageError(
            f"{name} takes {'a whole number' if kind is int else 'a number'}, not {value!r}."
        ) from None
    if not math.isfinite(number):
        raise UsageError(f"{name} takes a finite number, not {value!r}.")
    return number


def _bool(name: str, value: object) -> bool:
    text = str(value).lower()
    if text in ("true", "on", "yes", "1"):
        return True
    if text in ("false", "off", "no", "0"):
        return False
    raise UsageError(f"{name} takes true or false, not {value!r}.")


def _check(name: str, value: Any, meta: Mapping[str, Any]) -> None:
    counted = meta["or_count"] and str(value).isdecimal() and int(value) >= 1
    if meta["choices"] and str(value) not in meta["choices"] and not counted:
        or_count = ", or a whole number from 1 on" if meta["or_count"] else ""
        raise UsageError(
            f"{name} takes one of {', '.join(meta['choices'])}{or_count}; found {value!r}."
            f"{nearest(str(value), meta['choices'])}"
        )
    for key, bad in (("at_least", operator.lt), ("above", operator.le), ("below", operator.ge)):
        limit = meta[key]
        if limit is not None and bad(value, limit):
            words = key.replace("_", " ")
            raise UsageError(f"{name} must be {words} {limit:g}; found {value}.")


def _check_length(value: object, shown: str) -> None:
    if value == LONGEST:
        raise UsageError(
            f"{shown} {LONGEST} trains nothing: `mst plan --max-length {LONGEST}`, with the other"
            " options as they are, says how long rows may be here. Pass one of those numbers."
        )


def convert(name: str, value: object, shown: str) -> Any:
    """Return `value` as the type of option `name`; `shown` is how the user spelt it.

    Raises:
        UsageError: when it is not of that type, not a known choice or out of range.
    """
    each = fields()[name]
    kind, many = _kinds()[name]
    if many:
        if isinstance(value, dict) and "=" in each.metadata["metavar"]:
            value = [f"{key}={one}" for key, one in value.items()]
        items = value if isinstance(value, (list, tuple)) else str(value).split(",")
        return tuple(str(item).strip() for item in items if str(item).strip())
    if name == "max_length":
        _check_length(value, shown)
    if isinstance(value, (list, dict)):
        raise UsageError(f"{shown} takes one value, not {value!r}.")
    if kind is str and isinstance(value, bool):
        # YAML 1.1 reads a bare `on` or `off` as a boolean.
        value = "on" if value else "off"
    result = (
        _bool(shown, value)
        if kind is bool
        else _number(shown, kind, value)
        if kind in (int, float)
        else str(value)
    )
    _check(shown, result, each.metadata)
    if each.metadata["metavar"] == "SIZE":
        size_bytes(str(result), shown)
    return result


def spelled(value: object) -> str:
    """Return a value that `convert` has made as a command line has it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def yaml_in(path: Path, what: str, advice: str) -> Any:
    """Return the plain values of a YAML file that a user named.

    Args:
        path: the file.
        what: stands before the path where it can't be read.
        advice: follows the reason there.

    Raises:
        UsageError: it can't be read, is too long, or is no YAML. No text of it is quoted.
    """
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(_MOST_YAML_BYTES + 1).decode("utf-8")
        if len(text) > _MOST_YAML_BYTES:
            raise UsageError(
                f"{path} has more than {_MOST_YAML_BYTES >> 20} MiB, which no file of options has."
            )
        return load_yaml(text, path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"cannot read {what} {path}: {reason}. {advice}") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date that is none
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{place} is not YAML: {problem_of(error)}.") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read options from a YAML file; keys are canonical names or peers' aliases.

    Raises:
        UsageError: unreadable, oversized, not a mapping, an unknown key (names the nearest), a bad
            value, or an alias.
    """
    advice = "The first argument is a YAML file; all else is given as --options."
    loaded = yaml_in(path, "the options in", advice)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} holds a {type(loaded).__name__}; expected lines of `key: value`.")
    known, aliases = fields(), alias_names()
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        spelt = str(key).replace("-", "_")
        name = aliases.get(spelt, spelt)
        if name not in known:
            hint = nearest(spelt, list(known))
            shown = shown_names([str(key)])
            raise UsageError(f"{path}: unknown key {shown}.{hint} `mst train --help` lists them.")
        if value is None:
            continue
        if name == "resume" and isinstance(value, bool):
            # Peers write `resume_from_checkpoint: true`.
            value = "last" if value else None
            if value is None:
                continue
        values[name] = convert(name, value, f"{path}: {key}")
    return values


def given_options(args: argparse.Namespace) -> frozenset[str]:
    """Return the names of the options that the YAML file or a flag spelt out."""
    flags = {name for name in fields() if getattr(args, name) is not None}
    return frozenset(flags | set(read_yaml(Path(args.config)) if args.config else {}))


def train_request(args: argparse.Namespace) -> TrainRequest:
    """Return the request: defaults, overridden by the YAML file, overridden by flags."""
    values: dict[str, Any] = read_yaml(Path(args.config)) if args.config else {}
    for name in fields():
        given = getattr(args, name)
        if given is not None:
            values[name] = convert(name, given, "--" + name.replace("_", "-"))
    return TrainRequest(**values)
