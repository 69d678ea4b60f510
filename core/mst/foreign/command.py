"""The command that trains, found in a shell script and taken apart; nothing is run."""

from __future__ import annotations

import operator
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.errors import UsageError

LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "torch.distributed.run")
# The program or module of each tool, as the last part of a path.
PROGRAMS = {
    "swift": "ms-swift",
    "llamafactory-cli": "llama-factory",
    "lmf": "llama-factory",
    "axolotl": "axolotl",
    "trl": "trl",
}
SCRIPTS = {
    r"(?:.*/)?swift[./]cli[./](\w+?)(\.py)?": "ms-swift",
    r"(.*/)?src/train(_bash)?\.py|(.*/)?llamafactory/(cli|launcher)\.py|llamafactory\.cli": (
        "llama-factory"
    ),
    r"axolotl\.cli\.(train)": "axolotl",
    r"(?:.*/)?(?:trl|examples)/scripts/(\w+)\.py|(?:.*/)?(sft|dpo|kto|orpo|cpo)\.py": "trl",
}
TRAINS = {
    "ms-swift": {"sft", "pt", "rlhf"},
    "llama-factory": {"train"},
    "axolotl": {"train"},
    "trl": {"sft", "dpo", "kto", "orpo", "cpo", "reward", "grpo", "rloo"},
}
_ASSIGNED = re.compile(r"[A-Za-z_]\w*=")
_ARITHMETIC = re.compile(r"\$\(\s*expr\s+([-+*/\d\s]+)\)|\$\(\(([-+*/\d\s]+)\)\)")
# Quoted text, which is kept, or a comment: `#` begins one at a word's start only, as in data#200.
_COMMENT = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*'|\\.)|(?:(?<=\s)|^)#.*""")
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class Command:
    """A command line, taken apart.

    Attributes:
        tool: whose it is.
        name: its subcommand, such as `sft`.
        config: the file that it takes options from.
        values: its options, keys with underscores.
        environment: variables set for it.
        launcher: options of torchrun, accelerate or deepspeed before it.
    """

    tool: str
    name: str
    config: str | None
    values: dict[str, Any]
    environment: dict[str, str]
    launcher: dict[str, Any]


def find_command(text: str, path: Path) -> Command | None:
    """Return the command that trains; None where the text has none.

    Raises:
        UsageError: several commands train, or the one that does isn't whole.
    """
    found = [each for each in map(_taken_apart, _lines(text, path)) if each is not None]
    if len(found) > 1:
        names = ", ".join(f"{each.tool} {each.name}" for each in found)
        raise UsageError(
            f"{path} holds {len(found)} commands that train ({names}). Put the one to be"
            " translated into a file of its own."
        )
    return found[0] if found else None


def _lines(text: str, path: Path) -> Iterator[list[str]]:
    """Yield each command's words, variables put in where the script sets them to plain text."""
    known: dict[str, str] = {}
    exported: list[str] = []
    for line in _joined(text):
        for name, value in known.items():
            line = re.sub(rf"\$(?:{name}\b|{{{name}}})", lambda _, v=value: v, line)  # type: ignore[misc]
        line = _ARITHMETIC.sub(_computed, line)
        try:
            found = shlex.split(_COMMENT.sub(lambda match: match[1] or "", line))
        except ValueError:
            if any(re.search(rf"\b{name}\s", line) for name in (*PROGRAMS, *LAUNCHERS)):
                raise UsageError(
                    f"{path}: the command that trains has a quotation mark without its partner."
                    " Put the command alone into a file, or give the YAML file that it uses."
                ) from None
            continue
        if found and found[0] == "export":
            exported += [each for each in found[1:] if _ASSIGNED.match(each)]
        elif found and all(_ASSIGNED.match(each) for each in found):
            known |= {k: v for k, _, v in (each.partition("=") for each in found) if "$" not in v}
        elif found:
            yield [*exported, *found]


def _joined(text: str) -> Iterator[str]:
    """Yield lines, those that end in a backslash with the next; a comment goes on nowhere."""
    begun = ""
    for line in text.splitlines():
        if not begun and line.lstrip().startswith("#"):
            continue
        if line.endswith("\\"):
            begun += line[:-1] + " "
        else:
            yield begun + line
            begun = ""
    yield begun


def _computed(match: re.Match[str]) -> str:
    """Return what whole numbers with signs between them come to; other text stays as it is."""
    parts = re.findall(r"\d+|[-+*/]", match[1] or match[2])
    if not re.fullmatch(r"\d+( [*/] \d+)*|\d+( [-+] \d+)*", " ".join(parts)):
        return match[0]
    result = int(parts[0])
    for sign, right in zip(parts[1::2], parts[2::2], strict=True):
        if sign == "/" and int(right) == 0:
            return match[0]
        result = _OPERATORS[sign](result, int(right))
    return str(result)


def _taken_apart(found: Sequence[str]) -> Command | None:
    """Return the command of one line of words; None where it doesn't train."""
    rest, environment = list(found), {}
    while rest and (_ASSIGNED.match(rest[0]) or rest[0] in ("env", "nohup", "exec", "time")):
        variable, sign, value = rest.pop(0).partition("=")
        if sign:
            environment[variable] = value
    for index, word in enumerate(rest):
        tool, name = _program(word)
        if tool is None:
            continue
        after = rest[index + 1 :]
        name = after.pop(0) if name is None and after else name
        if name is None or name not in TRAINS[tool]:
            continue
        launcher, _ = _options(rest[:index])
        values, loose = _options(after)
        if tool == "llama-factory":  # key=value, as OmegaConf reads it
            values |= {k: v for k, s, v in (each.partition("=") for each in loose) if s}
        configs = [each for each in loose if re.search(r"\.(ya?ml|json)$", each)]
        config = values.pop("config", None) or (configs[0] if configs else None)
        return Command(tool, name, config, values, environment, launcher)
    return None


def _program(word: str) -> tuple[str | None, str | None]:
    """Return whose program a word names, and the subcommand where its name says it."""
    base = word.rsplit("/", 1)[-1]
    if base in PROGRAMS:
        return PROGRAMS[base], None
    for pattern, tool in SCRIPTS.items():
        match = re.fullmatch(pattern, word)
        if match is not None:
            named = [each for each in match.groups() if each and each in TRAINS[tool]]
            return tool, named[0] if named else "train" if tool == "llama-factory" else None
    return None, None


def _options(found: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return options with their values, and words that belong to none."""
    values: dict[str, Any] = {}
    loose: list[str] = []
    key: str | None = None
    for word in found:
        if word in ("&", "|", "&&", "||", ";") or re.match(r"\d?>", word):
            break
        if re.match(r"--?[A-Za-z]", word):
            key, sign, value = word.lstrip("-").partition("=")
            key = key.replace("-", "_").removesuffix(";")
            values[key] = [value] if sign else []
            key = None if sign else key
        elif key is None:
            loose.append(word)
        else:
            values[key].append(word)
    single = {k: "true" if not v else v[0] if len(v) == 1 else v for k, v in values.items()}
    return single, loose
