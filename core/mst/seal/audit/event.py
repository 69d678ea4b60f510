"""One event of the audit log: what it holds, and the bytes that stand for it."""

from __future__ import annotations

import hashlib
import math
import os
import pwd
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import PurePath
from typing import Any, TypeAlias

VERSION = 1
ZERO = "0" * 64
KEYS = frozenset(
    {"command", "event", "facts", "host", "pid", "prev", "seq", "time", "uid", "user", "v"}
)

JsonValue: TypeAlias = (
    str | int | float | bool | Sequence["JsonValue"] | Mapping[str, "JsonValue"] | None
)
# RFC 8785 has no numbers but doubles: beyond this, an integer is written as text.
_LARGEST = 2**53 - 1


@dataclass(frozen=True)
class Who:
    """Who acts, as the kernel and the user database say.

    Attributes:
        uid: the process's real user.
        user: its name.
        host: name of the machine.
        pid: the process.
        command: tells the events of one command from those of others.
    """

    uid: int
    user: str
    host: str
    pid: int
    command: str


def who(command: str) -> Who:
    """Return who this process acts for."""
    uid = os.getuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:  # a container may run as a number without a name
        user = str(uid)
    return Who(uid, user, os.uname().nodename, os.getpid(), command)


def now() -> str:
    """Return the time in UTC, to the microsecond, as RFC 3339 writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def plain(value: Any) -> Any:
    """Return a value that RFC 8785 can write: the same, or as text where JSON has no such thing."""
    if isinstance(value, str):
        # Names of files that are not UTF-8 come as lone surrogates.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) <= _LARGEST else str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, PurePath):
        return plain(str(value))
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(each) for each in value]
    return f"<{type(value).__name__}>"  # never its text: it might quote a row


def make(
    event: str, facts: Mapping[str, Any], seq: int, prev: str, by: Who, time: str
) -> dict[str, Any]:
    """Return an event as its line holds it.

    Args:
        event: what happened, as "subject.verb".
        facts: what there is to say of it; made plain here.
        seq: its number in its chain, from 0.
        prev: SHA-256 of the line before, in hexadecimal; 64 zeros for the first.
        by: who did it.
        time: from `now`.
    """
    return {
        "v": VERSION,
        "seq": seq,
        "prev": prev,
        "time": time,
        "event": event,
        "uid": by.uid,
        "user": by.user,
        "host": by.host,
        "pid": by.pid,
        "command": by.command,
        "facts": plain(facts),
    }


def line_of(event: Mapping[str, Any]) -> bytes:
    """Return the bytes of an event: canonical JSON (RFC 8785), without the line's end."""
    import rfc8785

    return rfc8785.dumps(dict(event))


def digest(line: bytes) -> str:
    """Return what the next event names as `prev`."""
    return hashlib.sha256(line).hexdigest()
