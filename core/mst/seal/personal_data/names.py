"""Names of persons, told by the field that they stand in: no language is guessed at.

A field is one of a row ("patient"), or one written in a text ("姓名：", "Patient name:").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from functools import lru_cache

# As they stand without spaces, dashes and underscores, in small letters.
FIELDS = frozenset((
    "name", "fullname", "firstname", "lastname", "surname", "givenname",
    "familyname", "middlename", "realname", "username", "patient", "patientname",
    "customer", "customername", "client", "clientname", "employee", "employeename",
    "student", "studentname", "doctor", "doctorname", "physician", "contact",
    "contactname", "contactperson", "accountholder", "cardholder", "cardholdername", "beneficiary",
    "payee", "payeename", "insured", "applicant", "nextofkin", "guardian",
    "姓名", "名字", "真实姓名", "患者", "患者姓名", "病人", "病人姓名", "客户姓名",
    "客户名称", "联系人", "联系人姓名", "收件人", "收款人", "付款人", "户名", "持卡人",
    "开户人", "申请人", "被保险人", "投保人", "监护人", "家属", "家属姓名", "学生姓名",
    "员工姓名", "医生姓名", "主治医师",
))  # fmt: skip
# With one of these beside it, `name` is that of a tool, a function or a message.
_NOT_OF_PERSONS = frozenset(
    {"arguments", "parameters", "description", "function", "role", "content", "type"}
)
_SEPARATORS = re.compile(r"[\s_.\-]+")
_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_CHINESE = re.compile(f"[{_HAN}]{{2,4}}|[{_HAN}]{{1,8}}(?:[·・•][{_HAN}]{{1,8}}){{1,3}}")
_WORD = r"[^\W\d_](?:[^\W\d_]|['’-])*\.?"
_OTHER = re.compile(rf"{_WORD}(?:,? {_WORD}){{0,4}}")
_NO_NAMES = frozenset(
    {"null", "none", "nan", "na", "unknown", "true", "false", "yes", "no", "anonymous"}
)
# In a text, the label must be a plain one, and the name begin with a capital.
_LABELS = ("姓名", "患者", "病人", "联系人", "收件人", "收款人", "持卡人", "户名", "监护人")
_LABELS_LATIN = ("name", "patient", "customer", "cardholder", "account holder")
_COLON = re.compile("[:：]")
_BEHIND_CHINESE = re.compile(f"\\s*([{_HAN}]{{2,4}}(?:·[{_HAN}]{{1,8}})?)(?![{_HAN}])")
_CAPITAL = r"[A-Z\u00c0-\u00de][^\W\d_]*(?:['’-][^\W\d_]+)*"
_BEHIND_LATIN = re.compile(
    rf"[ \t]*((?:(?:Mr|Mrs|Ms|Dr|Prof)\. )?{_CAPITAL}(?: {_CAPITAL}){{1,3}})(?!\w)"
)


def is_field(key: str, beside: Set[str]) -> bool:
    """Return whether a field holds the name of a person.

    Args:
        key: the field's name.
        beside: all names of the same object.
    """
    plain = _plain(key)
    return plain in FIELDS and not (plain == "name" and _NOT_OF_PERSONS & beside)


@lru_cache(maxsize=4096)
def _plain(key: str) -> str:
    return _SEPARATORS.sub("", key).lower()


def is_name(value: str) -> bool:
    """Return whether a field's value has the form of a name: a few words without digits."""
    value = value.strip()
    return len(value) <= 60 and bool(_CHINESE.fullmatch(value) or _latin(value))


def _latin(value: str) -> bool:
    return len(value) >= 2 and value.lower() not in _NO_NAMES and bool(_OTHER.fullmatch(value))


def labelled(text: str) -> Iterator[tuple[int, int]]:
    """Yield where names stand behind a label in a text."""
    for colon in _COLON.finditer(text):
        at = colon.start()
        before = text[max(0, at - 16) : at].rstrip()
        if before.endswith(_LABELS):
            behind = _BEHIND_CHINESE.match(text, at + 1) or _BEHIND_LATIN.match(text, at + 1)
        elif before.lower().endswith(_LABELS_LATIN):
            behind = _BEHIND_LATIN.match(text, at + 1) or _BEHIND_CHINESE.match(text, at + 1)
        else:
            continue
        if behind:
            yield behind.span(1)
