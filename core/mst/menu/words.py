"""The menu's texts, in one TOML file a language. English is ASCII, for terminals without UTF-8.

Figures have their names from `mst.figure_names`, as on the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mst.figure_names import figure_names
from mst.translation import encodes, tables, translated, translated_error

_UTF8 = ("utf-8", "utf8")


@dataclass(frozen=True)
class Words:
    """A language's texts.

    Attributes:
        language: of `mst.translation.LANGUAGES`.
        texts: by "table.key"; places for values are written as in `str.format`.
    """

    language: str
    texts: Mapping[str, str]

    def __call__(self, key: str, **values: object) -> str:
        """Return a text with its values."""
        return self.texts[key].format(**values)

    def said(self, text: str) -> str:
        """Return a sentence that a command has for people, where it is known in this language."""
        return translated(text, self.language)

    def error(self, error: Exception) -> str:
        """Return an error: its kind, then what was asked, what was found, and what to do."""
        return translated_error(type(error).__name__, str(error), self.language)


def words_of(language: str) -> Words:
    """Return the texts of a language."""
    plain = tables(Path(__file__).with_name(f"{language}.toml"))
    plain["figures"] = figure_names(language)
    texts = {
        f"{table}.{key}": str(text) for table, keys in plain.items() for key, text in keys.items()
    }
    return Words(language, texts)


def ascii_alone(environ: Mapping[str, str], encoding: str) -> bool:
    """Return whether drawings must be of ASCII alone.

    Python itself turns the locale C into C.UTF-8 (PEP 538), which says nothing of the terminal.
    """
    if not encodes(encoding, "•│─"):
        return True
    named = (environ.get("LC_ALL"), environ.get("LANG"))
    of_python = environ.get("LC_CTYPE", "") in ("", "C.UTF-8", "C.utf8", "UTF-8")
    return of_python and not any(
        each and any(kind in each.lower() for kind in _UTF8) for each in named
    )


def duration_words(words: Words, seconds: float) -> str:
    """Return seconds in the unit that a person would use."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return words(f"time.{unit}", count=f"{seconds / size:.1f}")
    return words("time.seconds", count=f"{max(seconds, 0):.0f}")
