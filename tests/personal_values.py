"""Made-up personal data with right check digits, and the same with a wrong one.

The digits are computed by other formulas than `mst.seal.personal_data.checksums` has.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_USCC = "0123456789ABCDEFGHJKLMNPQRTUWXY"
_CARDS = (
    ("4", 16), ("51", 16), ("2720", 16), ("34", 15), ("3530", 16), ("6011", 16), ("622202", 19),
    ("62", 16), ("6217", 18), ("2201", 16),
)  # fmt: skip
# Country, and the form of its account numbers: n a digit, a a capital.
_IBANS = {"DE": "n" * 18, "GB": "aaaa" + "n" * 14, "NL": "aaaa" + "n" * 10, "CH": "n" * 17}
_IBANS |= {"FR": "n" * 23, "NO": "n" * 11, "SA": "n" * 20}


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789", k=count))


def id_card(rng: random.Random) -> str:
    """Return a resident's number: ISO 7064 MOD 11-2 read as a number to the base 13, doubled."""
    place = rng.choice(("110105", "310101", "440305", "510104", "650102", "810000"))
    born = f"{rng.randint(1930, 2020)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
    body = place + born + _digits(rng, 3)
    total = 0
    for digit in body:
        total = (total + int(digit)) * 2 % 11
    check = (12 - total) % 11
    return body + ("X" if check == 10 else str(check))


def bank_card(rng: random.Random) -> str:
    """Return a card's number: Luhn by the table of doubled digits."""
    prefix, length = rng.choice(_CARDS)
    body = prefix + _digits(rng, length - len(prefix) - 1)
    total = sum(
        (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)[int(digit)] if place % 2 == 0 else int(digit)
        for place, digit in enumerate(reversed(body))
    )
    return body + str(-total % 10)


def uscc(rng: random.Random) -> str:
    """Return a credit code: the check that makes the sum of 3^i times value divide by 31."""
    body = rng.choice(("91", "92", "5A", "12", "N1")) + "110108" + "".join(rng.choices(_USCC, k=9))
    total, weight = 0, 1
    for each in body:
        total, weight = total + weight * _USCC.index(each), weight * 3 % 31
    return body + _USCC[-total % 31]


def iban(rng: random.Random) -> str:
    """Return an account: 98 less the remainder of all digits, taken one at a time."""
    country, form = rng.choice(list(_IBANS.items()))
    account = "".join(_digits(rng, 1) if each == "n" else rng.choice("ABCDWXYZ") for each in form)
    remainder = 0
    for each in account + country + "00":
        for digit in str("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(each)):
            remainder = (remainder * 10 + int(digit)) % 97
    return f"{country}{98 - remainder:02}{account}"


def us_ssn(rng: random.Random) -> str:
    """Return a social security number."""
    area = rng.choice([each for each in range(1, 900) if each != 666])
    return f"{area:03}-{rng.randint(1, 99):02}-{rng.randint(1, 9999):04}"


def phone(rng: random.Random) -> str:
    """Return a mobile number of mainland China, or one from abroad."""
    mobile = f"1{rng.choice('3456789')}{_digits(rng, 9)}"
    abroad = rng.choice(("+49 151 ", "+44 7700 ", "+33 6 12 ", "+81-90-", "+1 415 "))
    return rng.choice((mobile, f"+86 {mobile}", f"{mobile[:3]}-{mobile[3:7]}-{mobile[7:]}",
                       abroad + _digits(rng, 7)))  # fmt: skip


def email(rng: random.Random) -> str:
    """Return an address."""
    local, ending = rng.choice(("li.wei", "a_b+c", "Zoe")), rng.choice(("com", "com.cn", "de"))
    return f"{local}{_digits(rng, 3)}@mail.example.{ending}"


def passport(rng: random.Random) -> str:
    """Return the second line of a passport's machine readable zone."""
    number, country = f"E{_digits(rng, 8)}", "CHN"
    born = f"{rng.randint(50, 99)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
    ends = f"{rng.randint(27, 35)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
    rest = "<" * 14
    first, second, third = _mrz(number), _mrz(born), _mrz(ends)
    whole = _mrz(f"{number}{first}{born}{second}{ends}{third}{rest}0")
    return f"{number}{first}{country}{born}{second}F{ends}{third}{rest}0{whole}"


def _mrz(text: str) -> str:
    value = {each: number for number, each in enumerate("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")}
    weights = (7, 3, 1) * len(text)
    return str(sum(w * value.get(each, 0) for each, w in zip(text, weights, strict=False)) % 10)


VALUES: dict[str, Callable[[random.Random], str]] = {
    "id_card": id_card, "bank_card": bank_card, "uscc": uscc, "iban": iban, "us_ssn": us_ssn,
    "phone": phone, "email": email, "passport": passport,
}  # fmt: skip


def with_gaps(kind: str, value: str, rng: random.Random) -> str:
    """Return a card, an account or an identity number as people write it too."""
    if kind in ("bank_card", "iban") and len(value) != 15 and rng.random() < 0.4:
        gap = " " if kind == "iban" else rng.choice(" -")
        return gap.join(value[at : at + 4] for at in range(0, len(value), 4))
    if kind == "id_card" and rng.random() < 0.3:
        return f"{value[:6]} {value[6:14]} {value[14:]}"
    if kind in ("id_card", "phone", "bank_card") and rng.random() < 0.2:
        return "".join(chr(ord(each) + 0xFEE0) if each in "0123456789X" else each for each in value)
    return value


def wrong(kind: str, rng: random.Random) -> str:
    """Return a near miss: a wrong check digit, or a number that was never given."""
    value = VALUES[kind](rng)
    if kind in ("id_card", "bank_card"):
        last = rng.choice([each for each in "0123456789" if each != value[-1]])
        return value[:-1] + last
    if kind == "uscc":
        return value[:-1] + rng.choice([each for each in _USCC if each != value[-1]])
    if kind == "iban":
        return value[:2] + f"{(int(value[2:4]) + rng.randint(1, 90)) % 97:02}" + value[4:]
    if kind == "us_ssn":
        area = rng.choice(("000", "666", f"9{value[1:3]}"))
        return rng.choice((area + value[3:], f"{value[:3]}-00{value[6:]}", f"{value[:7]}0000"))
    if kind == "phone":
        start, digits = rng.choice((("12", 9), ("138", 7), ("138", 9), ("3.138", 8)))
        return start + _digits(rng, digits)
    if kind == "passport":
        return value[:-1] + str((int(value[-1]) + rng.randint(1, 9)) % 10)
    return value.replace("@", rng.choice((" at ", "@.", "@@")))


SENTENCES = (
    "客户的号码是{}，请核对后回复。", "我的卡号（{}）昨天丢了", "Please check {} for me.",
    "ref: {}", "{}", "订单：{}；已付款", "See {}, then call back.",
)  # fmt: skip
