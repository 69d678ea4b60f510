"""Numbers that prove themselves: which digits make a whole one, by the standard that says so.

Each is a few lines of our own. python-stdnum 2.2 computes the same checksums, but for a scan its
rules are too narrow: it refuses an identity number whose county was founded after the birth (people
carry the county of their first card), and credit codes that begin with a letter.
"""

from __future__ import annotations

from datetime import date

# GB/T 2260, the first two digits of a division: 81 to 83 stand for residents of Hong Kong, Macao
# and Taiwan since 2018.
_PROVINCES = frozenset(
    map(
        str,
        (*range(11, 16), 21, 22, 23, *range(31, 38), *range(41, 47), *range(50, 55),
         *range(61, 66), 71, 81, 82, 83),
    )
)  # fmt: skip
_ID_WEIGHTS = tuple(pow(2, 17 - place, 11) for place in range(17))
_ID_CHECKS = "10X98765432"
_USCC_DIGITS = "0123456789ABCDEFGHJKLMNPQRTUWXY"
_USCC_WEIGHTS = tuple(pow(3, place, 31) for place in range(17))
# ISO 13616 registry, release 99: characters of a country's IBAN.
_IBAN_LENGTHS = {
    **dict.fromkeys(("NO",), 15), "BE": 16,
    **dict.fromkeys(("DK", "FK", "FI", "FO", "GL", "NL", "SD"), 18),
    **dict.fromkeys(("MK", "SI"), 19),
    **dict.fromkeys(("AT", "BA", "EE", "KZ", "LT", "LU", "MN", "XK"), 20),
    **dict.fromkeys(("CH", "HR", "LI", "LV"), 21),
    **dict.fromkeys(("BG", "BH", "CR", "DE", "GB", "GE", "IE", "ME", "RS", "VA"), 22),
    **dict.fromkeys(("AE", "GI", "IL", "IQ", "OM", "SO", "TL"), 23),
    **dict.fromkeys(("AD", "CZ", "ES", "MD", "PK", "RO", "SA", "SE", "SK", "TN", "VG"), 24),
    **dict.fromkeys(("LY", "PT", "ST"), 25), **dict.fromkeys(("IS", "TR"), 26),
    **dict.fromkeys(("BF", "BI", "BJ", "CI", "CM", "DJ", "FR"), 27),
    **dict.fromkeys(("GR", "IT", "MC", "ML", "MR", "SM", "SN"), 27),
    **dict.fromkeys(("AL", "AZ", "BY", "CY", "DO", "GT", "HN", "HU", "LB", "NI", "PL", "SV"), 28),
    **dict.fromkeys(("BR", "EG", "PS", "QA", "UA"), 29),
    **dict.fromkeys(("JO", "KW", "MU", "YE"), 30), **dict.fromkeys(("MT", "SC"), 31),
    "LC": 32, "RU": 33,
}  # fmt: skip


def is_luhn(digits: str) -> bool:
    """Return whether the last digit is the Luhn check of the others.

    Source: ISO/IEC 7812-1:2017, annex B.
    """
    odd = sum(map(int, digits[-1::-2]))
    even = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (odd + even) % 10 == 0


def is_bank_card(digits: str) -> bool:
    """Return whether 13 to 19 digits are a payment card's: a network's range and length, and Luhn.

    Source: ISO/IEC 7812-1 for the form; the networks' published ranges of issuers: Visa 4,
    Mastercard 51-55 and 2221-2720, American Express 34 and 37, JCB 3528-3589, Diners 300-305, 36,
    38 and 39, Discover 6011, 644-649 and 65, UnionPay 62 and 81, Mir 2200-2204.
    """
    two, four, length = int(digits[:2]), int(digits[:4]), len(digits)
    known = (
        (digits[0] == "4" and length in (13, 16, 19))
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and length == 16)
        or (two in (34, 37) and length == 15)
        or (3528 <= four <= 3589 and 16 <= length <= 19)
        or ((3000 <= four <= 3059 or two in (36, 38, 39)) and length == 14)
        or ((four == 6011 or 6440 <= four <= 6599) and length in (16, 19))
        or (two in (62, 81) and 16 <= length <= 19)
        or (2200 <= four <= 2204 and 16 <= length <= 19)
    )
    return known and len(set(digits)) > 1 and is_luhn(digits)


def looks_like_resident_id(number: str) -> bool:
    """Return whether 18 characters begin as a Chinese resident's: province, then date of birth."""
    return number[:2] in _PROVINCES and _is_date(number[6:14])


def is_resident_id(number: str) -> bool:
    """Return whether 18 characters are a Chinese resident identity number.

    Source: GB 11643-1999, with ISO 7064 MOD 11-2: the weights are 2^(18-i) mod 11.
    """
    total = sum(w * int(digit) for w, digit in zip(_ID_WEIGHTS, number, strict=False))
    return looks_like_resident_id(number) and _ID_CHECKS[total % 11] == number[17].upper()


def _is_date(digits: str) -> bool:
    try:
        born = date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return False
    return 1850 <= born.year <= date.today().year and born <= date.today()


def is_uscc(code: str) -> bool:
    """Return whether 18 characters are a Chinese unified social credit code.

    Source: GB 32100-2015, appendix A: MOD 31-3 over 31 characters (no I, O, S, V, Z).
    """
    values = [_USCC_DIGITS.find(each) for each in code]
    if min(values) < 0 or code[2:4] not in {*_PROVINCES, "10"}:
        return False
    total = sum(w * value for w, value in zip(_USCC_WEIGHTS, values, strict=False))
    return (31 - total % 31) % 31 == values[17]


def is_iban(text: str) -> bool:
    """Return whether a text without spaces is an IBAN: its country's length, and MOD 97-10.

    Source: ISO 13616-1:2020 and its registry; ISO 7064.
    """
    if _IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(each, 36)) for each in text[4:] + text[:4])) % 97 == 1


def is_us_ssn(digits: str) -> bool:
    """Return whether nine digits can be a US social security number.

    Source: SSA, "Social Security Number Randomization": area 000, 666 and 900-999, group 00 and
    serial 0000 are never given. Three numbers that were printed as examples are no one's.
    """
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return (
        area not in ("000", "666")
        and area[0] != "9"
        and group != "00"
        and serial != "0000"
        and digits not in ("078051120", "219099999", "123456789")
    )


def is_passport_line(line: str) -> bool:
    """Return whether 44 characters are the second line of a passport's machine readable zone.

    Source: ICAO Doc 9303 part 3, section 4.9 (weights 7, 3, 1) and part 4, section 4.2.2.2.
    """
    whole = line[:10] + line[13:20] + line[21:43]
    parts = ((line[:9], line[9]), (line[13:19], line[19]), (line[21:27], line[27]))
    return all(_mrz_digit(part) == check for part, check in (*parts, (whole, line[43])))


def _mrz_digit(text: str) -> str:
    values = (0 if each == "<" else int(each, 36) for each in text)
    return str(sum(value * (7, 3, 1)[place % 3] for place, value in enumerate(values)) % 10)
