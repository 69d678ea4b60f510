"""Which scripts a text is written in: a measure of the mix of languages that needs no model."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping

# The first word of a letter's Unicode name, and what people call the script.
_NAMES = {
    "LATIN": "Latin", "FULLWIDTH": "Latin", "CJK": "Han", "IDEOGRAPHIC": "Han",
    "HIRAGANA": "Kana", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana", "HALFWIDTH": "Kana",
    "HANGUL": "Hangul", "CYRILLIC": "Cyrillic", "GREEK": "Greek", "ARABIC": "Arabic",
    "HEBREW": "Hebrew", "DEVANAGARI": "Devanagari", "BENGALI": "Bengali", "TAMIL": "Tamil",
    "THAI": "Thai", "GEORGIAN": "Georgian", "ARMENIAN": "Armenian", "ETHIOPIC": "Ethiopic",
    "TIBETAN": "Tibetan", "KHMER": "Khmer", "MYANMAR": "Burmese",
}  # fmt: skip


def script_shares(characters: Counter[str]) -> Mapping[str, float]:
    """Return each script's share of the letters, largest first.

    Args:
        characters: how often each character occurs. A Counter takes a text at the speed of C, and
            there are few different characters to name.
    """
    found: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():
            first = unicodedata.name(character, "OTHER").split()[0]
            found[_NAMES.get(first, "other")] += count
    letters = sum(found.values())
    return {script: count / letters for script, count in found.most_common()}
