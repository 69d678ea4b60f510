"""What commands say, for people who read Chinese: reasons of plans, errors, and helps of options.

Commands themselves speak English, which logs, scripts and searches rely on. The menu and the page
show their sentences through this. `translation.zh.toml` has a Chinese one for each English one, as
it stands in the code, with {0}, {1} … for what is put in; a test looks whether it still stands
there. What is not in it is shown as it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "zh")
# What joins the parts of a reason.
_JOINT = "; "
# What stands behind what a command is about to do.
_WAITING = " …"
_PLACE = re.compile(r"\{(\d+)\}")
# An error as the command line prints it, and its first word.
_ERROR = re.compile(r"(?:mst: )?([A-Z]\w*(?:Error|Fits|Lost|Memory|Refused|Interrupted)): (.+)")


@dataclass(frozen=True)
class _Template:
    """An English sentence cut at its places, and the Chinese one."""

    literals: tuple[str, ...]
    chinese: str

    def places(self, text: str) -> list[str] | None:
        """Return what a text has put into the places; None where it is another sentence.

        Each place ends where what follows it first stands, so that no text takes long.
        """
        first, *others = self.literals
        if not others:
            return [] if text == first else None
        if not text.startswith(first):
            return None
        found, at = [], len(first)
        for literal in others[:-1]:
            end = text.find(literal, at)
            if end < 0:
                return None
            found.append(text[at:end])
            at = end + len(literal)
        last = len(text) - len(others[-1])
        if last < at or not text.endswith(others[-1]):
            return None
        return [*found, text[at:last]]


def language_of(asked: str, environ: Mapping[str, str], encoding: str) -> str:
    """Return the language to speak.

    Args:
        asked: of `LANGUAGES`, or "auto": as the locale says.
        environ: the process's environment.
        encoding: of the terminal; one that has no Chinese characters gets English.
    """
    wanted = asked
    if asked == "auto":
        named = (environ.get(each, "") for each in ("LC_ALL", "LC_MESSAGES", "LANG"))
        wanted = "zh" if next(filter(None, named), "").lower().startswith("zh") else "en"
    return wanted if wanted == "en" or encodes(encoding, "中") else "en"


def translated(text: str, language: str) -> str:
    """Return a sentence of mst in a language, "en" or "zh"; as it is where it is not known."""
    if language == "en":
        return text
    exact, templates = _catalogue(language)
    if text in exact:
        return exact[text]
    for each in templates:
        found = each.places(text)
        if found is not None and _is_whole(text, each, found):
            return each.chinese.format(*(translated(one, language) for one in found))
    parts = text.split(_JOINT)
    told = [translated(each, language) for each in parts] if len(parts) > 1 else parts
    return text if told == parts else "；".join(told)


def _is_whole(text: str, template: _Template, places: list[str]) -> bool:
    """Return whether a text is one sentence of a template's kind, and not several."""
    if text.endswith("."):  # an error; what it quotes may hold anything
        return template.literals[-1].endswith(".")
    return _JOINT not in "".join(places)


def translated_error(kind: str, text: str, language: str) -> str:
    """Return an error as a person is told it: its kind, and what was asked, found and is to do."""
    return f"{kind}: {translated(text, language)}"


def translated_lines(text: str, language: str) -> str:
    """Return what a command has printed, with its errors, and lines that are known as a whole.

    Lines of a table are left as they are: a cell's piece may look like a sentence.
    """
    if language == "en":
        return text
    exact, _ = _catalogue(language)

    def line(text: str) -> str:
        found = _ERROR.fullmatch(text)
        if found is not None:
            return translated_error(found[1], found[2], language)
        told = text.removesuffix(_WAITING)
        return translated(text, language) if told != text else exact.get(text, text)

    return "\n".join(map(line, text.split("\n")))


@lru_cache
def _catalogue(language: str) -> tuple[dict[str, str], tuple[_Template, ...]]:
    """Return sentences without places, and templates, those with the most of their own first."""
    exact: dict[str, str] = {}
    templates: list[_Template] = []
    for english, chinese in sentences(language).items():
        literals = tuple(_PLACE.split(english)[::2])
        if len(literals) == 1:
            exact[english] = chinese
        else:
            templates.append(_Template(literals, chinese))
    templates.sort(key=lambda each: -sum(map(len, each.literals)))
    return exact, tuple(templates)


def sentences(language: str) -> dict[str, str]:
    """Return the sentences of the catalogue by the English ones."""
    plain = tables(Path(__file__).with_name(f"translation.{language}.toml"))
    return {english: str(text) for table in plain.values() for english, text in table.items()}


def tables(file: Path) -> dict[str, dict[str, Any]]:
    """Return the tables of a TOML file of texts."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(file.read_text(encoding="utf-8"))


def encodes(encoding: str, text: str) -> bool:
    """Return whether an encoding has every character of a text."""
    try:
        text.encode(encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True
