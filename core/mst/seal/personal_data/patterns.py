"""Personal data in a text: where it stands and of which kind it is, never what it says."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mst.seal.personal_data import checksums, names

# What a masked copy has in place of a value: "[ID_CARD]" and so on.
KINDS = (
    "id_card", "uscc", "passport", "iban", "bank_card", "us_ssn", "phone", "email", "ip", "name",
)  # fmt: skip


class Found(NamedTuple):
    """A value's place.

    Attributes:
        kind: of `KINDS`.
        start: its first character.
        end: behind its last.
    """

    kind: str
    start: int
    end: int


# Forms of full width, which Chinese input methods write, one character for one.
_WIDE = {0xFF10 + digit: str(digit) for digit in range(10)}
_WIDE |= {0xFF21 + letter: chr(65 + letter) for letter in range(26)}
_WIDE |= {0xFF41 + letter: chr(97 + letter) for letter in range(26)}
_WIDE |= {0xFF20: "@", 0xFF0E: ".", 0xFF0D: "-", 0xFF0B: "+", 0x3000: " ", 0xFF08: "(", 0xFF09: ")"}
_HAS_WIDE = re.compile("[\uff10-\uff19\uff20\uff21-\uff3a\uff41-\uff5a]")
# One that may stand between the groups of a number: spaces and dashes of all kinds.
_GAP = "[ \\-\u2010-\u2015\u00a0\u202f]"
_MANY_DIGITS = re.compile("[0-9](?:[^0-9A-Za-z]{0,2}[0-9]){5}")
# What a number may go on with behind its first digits, an IBAN's and a USCC's letters included.
_REST = re.compile("[0-9A-Z<+(). \\-\u2010-\u2015\u00a0\u202fx]*")
# In front of its first six digits may stand "+", "(", "(+86) " or the letters of an IBAN or USCC.
_BEFORE = 12
_START, _END = "(?<![0-9A-Za-z])(?<![0-9][.])", "(?![0-9A-Za-z])"
_ALONE = f"(?<![0-9]{_GAP}){_START}"
# ITU-T E.164, list of assigned country codes (2016).
_COUNTRY = (
    "(?:1|7|2[07]|2[1-69][0-9]|3[0-469]|3[578][0-9]|4[013-9]|42[0-9]|5[1-8]|5[09][0-9]|6[0-6]"
    "|6[7-9][0-9]|8[1246]|8[0578][0-9]|9[0-58]|9[679][0-9])"
)
_NOT_WRITTEN = re.compile("[^0-9A-Za-z<]+")


def _is_card(digits: str) -> bool:
    # An identity number with a wrong digit is one that was mistyped, and no card by chance.
    if len(digits) == 18 and checksums.looks_like_resident_id(digits):
        return False
    return checksums.is_bank_card(digits)


def _is_abroad(digits: str) -> bool:
    return 8 <= len(digits) <= 15


def _pattern(text: str, start: str = _START) -> re.Pattern[str]:
    return re.compile(f"{start}(?:{text}){_END}")


# NANPA: toll-free and premium areas, which are no person's.
_NO_AREA = "(?!8(?:00|33|44|55|66|77|88)|900)"
_FOUR = f"{_GAP}[0-9]{{4}}"
_NO_MORE = f"(?!{_GAP}[0-9])"
# Kind, form, and what proves the digits and letters of it; of two in one place `KINDS` decides.
_NUMBERS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    (
        "passport",
        _pattern("[A-Z0-9<]{9}[0-9][A-Z<]{3}[0-9]{7}[MFX<][0-9]{7}[A-Z0-9<]{15}[0-9]"),
        checksums.is_passport_line,
    ),
    (
        "id_card",
        _pattern(
            f"[1-9][0-9]{{5}}{_GAP}?[12][0-9]{{3}}{_GAP}?[01][0-9]{_GAP}?[0-3][0-9]{_GAP}?"
            "[0-9]{3}[0-9Xx]"
        ),
        checksums.is_resident_id,
    ),
    ("uscc", _pattern("[0-9A-Y]{2}[0-9]{6}[0-9A-Y]{10}"), checksums.is_uscc),
    ("iban", _pattern("[A-Z]{2}[0-9]{2}[A-Z0-9]{11,30}"), checksums.is_iban),
    (
        "iban",
        _pattern(f"[A-Z]{{2}}[0-9]{{2}}(?:{_GAP}[A-Z0-9]{{4}}){{2,7}}(?:{_GAP}[A-Z0-9]{{1,4}})?"),
        checksums.is_iban,
    ),
    ("bank_card", _pattern("[2-68][0-9]{12,18}"), _is_card),
    (
        "bank_card",
        _pattern(f"[2-68][0-9]{{3}}(?:{_FOUR}){{2,3}}{_GAP}[0-9]{{1,4}}{_NO_MORE}", _ALONE),
        _is_card,
    ),
    (
        "bank_card",
        _pattern(f"3[0-9]{{3}}{_GAP}[0-9]{{6}}{_GAP}[0-9]{{4,5}}{_NO_MORE}", _ALONE),
        _is_card,
    ),
    ("bank_card", _pattern(f"62[0-9]{{4}}{_GAP}[0-9]{{10,13}}{_NO_MORE}", _ALONE), _is_card),
    (
        "us_ssn",
        _pattern(f"[0-9]{{3}}({_GAP})[0-9]{{2}}\\1[0-9]{{4}}{_NO_MORE}", _ALONE),
        checksums.is_us_ssn,
    ),
    # MIIT's numbering plan (2017): mobile numbers have 11 digits and begin with 13 to 19.
    (
        "phone",
        _pattern(
            f"(?:(?:[(](?:[+]|00)86[)]|(?:[+]|00)?86){_GAP}?)?1[3-9][0-9]"
            f"(?:[0-9]{{8}}|{_FOUR}{_FOUR})"
        ),
        bool,
    ),
    # Fixed lines of mainland China, by the same plan: an area of 3 or 4 digits, then 7 or 8.
    (
        "phone",
        _pattern(
            f"(?:0[1-9][0-9]{{1,2}}-|[(]0[1-9][0-9]{{1,2}}[)]{_GAP}?)[2-9][0-9]{{6,7}}", _ALONE
        ),
        bool,
    ),
    (
        "phone",
        _pattern(f"[+]{_COUNTRY}(?:[ .()\\-\u00a0]{{0,2}}[0-9]){{5,13}}", "(?<![0-9A-Za-z+])"),
        _is_abroad,
    ),
    # North America, with its marks: neither area nor exchange begins with 0 or 1.
    (
        "phone",
        _pattern(
            f"(?:1[ .-])?(?:[(]{_NO_AREA}[2-9][0-9]{{2}}[)] ?|{_NO_AREA}[2-9][0-9]{{2}}[ .-])"
            "[2-9][0-9]{2}[.-][0-9]{4}",
            _ALONE,
        ),
        bool,
    ),
)
_ADDRESS = re.compile(f"{_START}[0-9]{{1,3}}(?:[.][0-9]{{1,3}}){{3}}(?![0-9A-Za-z]|[.][0-9])")
_LOCAL = re.compile(r"[A-Za-z0-9_.+%'-]+\Z")
_DOMAIN = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9])"
)


def find(text: str) -> list[Found]:
    """Return what of a text is personal data, by its place; no two overlap."""
    if not text.isascii() and _HAS_WIDE.search(text):
        text = text.translate(_WIDE)
    found: list[Found] = []
    end = 0
    for many in _MANY_DIGITS.finditer(text):
        if many.start() < end:
            continue
        rest = _REST.match(text, many.start())
        assert rest is not None
        begin = max(end, many.start() - _BEFORE)
        # A run of capitals and digits is never cut: a number's end must be its end.
        end = rest.end()
        _numbers(text, begin, end, found)
    if "@" in text:
        found += _emails(text)
    if "." in text:
        found += _addresses(text)
    found += (Found("name", *place) for place in names.labelled(text))
    return _apart(found) if len(found) > 1 else found


def _numbers(text: str, begin: int, end: int, found: list[Found]) -> None:
    # One more character, or what follows would be out of sight of the patterns' ends.
    for kind, pattern, proves in _NUMBERS:
        for each in pattern.finditer(text, begin, end + 1):
            if proves(_NOT_WRITTEN.sub("", each[0])):
                found.append(Found(kind, each.start(), each.end()))


def _emails(text: str) -> Iterator[Found]:
    at = text.find("@")
    while at >= 0:
        # RFC 5321, section 4.5.3.1.1: 64 characters at most in front of the "@".
        local = _LOCAL.search(text, max(0, at - 64), at)
        domain = _DOMAIN.match(text, at + 1)
        if local and domain:
            yield Found("email", local.start(), domain.end())
        at = text.find("@", at + 1)


def _addresses(text: str) -> Iterator[Found]:
    for each in _ADDRESS.finditer(text):
        try:
            # Only one that a person may have on the internet; versions mostly begin below 10.
            counts = ipaddress.IPv4Address(each[0]).is_global and int(each[0].split(".")[0]) > 9
        except ValueError:
            continue
        if counts:
            yield Found("ip", each.start(), each.end())


def _apart(found: list[Found]) -> list[Found]:
    """Return them in the order of their places; of two that overlap the first of `KINDS` stays."""
    kept: list[Found] = []
    for each in sorted(found, key=lambda one: (one.start, KINDS.index(one.kind))):
        if not kept or each.start >= kept[-1].end:
            kept.append(each)
        elif KINDS.index(each.kind) < KINDS.index(kept[-1].kind):
            kept[-1] = each
    return kept
