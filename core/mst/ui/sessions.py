"""Who may look: a link that works once, and the session that a browser gets for it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

# Browsers that are in at once; the oldest is out when one more comes.
_MOST = 32
# A session ends so long after it was entered, and after the page was last looked at: one that
# nobody looks at asks nothing.
LONGEST_SECONDS, IDLE_SECONDS = 12 * 3600.0, 3600.0


def _boot_seconds() -> float:
    """Return the seconds since this machine was started, those that it slept among them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass
class _Session:
    key: bytes
    entered: float
    used: float


class Sessions:
    """Links and sessions. Neither is kept as it is, but by its hash."""

    def __init__(
        self, port: int, show: Callable[[str], None], clock: Callable[[], float] = _boot_seconds
    ) -> None:
        """Make the first link.

        Args:
            port: of the page. Browsers send cookies to all ports of a host, so its name has it.
            show: shows a person a link's token, the first and each that follows one that was used.
            clock: seconds, from any beginning.
        """
        self.cookie = f"mst-ui-{port}"
        self._show, self._clock = show, clock
        self._link = b""
        self._inside: list[_Session] = []
        self._new_link()

    def _new_link(self) -> None:
        token = secrets.token_urlsafe(32)
        self._link = _hash(token)
        self._show(token)

    def enter(self, token: str) -> str | None:
        """Return the value of a new session's cookie header; None for a token that isn't good.

        The link is used up by it, and the next is shown.
        """
        if not hmac.compare_digest(_hash(token), self._link):
            return None
        made, now = secrets.token_urlsafe(32), self._clock()
        self._inside = [*self._inside[1 - _MOST :], _Session(_hash(made), now, now)]
        self._new_link()
        return f"{self.cookie}={made}; Path=/; HttpOnly; SameSite=Strict"

    def is_inside(self, cookies: str) -> bool:
        """Return whether a request's cookies have a session; asking is a use of it."""
        now = self._clock()
        self._inside = [
            each
            for each in self._inside
            if now - each.entered < LONGEST_SECONDS and now - each.used < IDLE_SECONDS
        ]
        found = self._of(cookies)
        for each in found:
            each.used = now
        return bool(found)

    def leave(self, cookies: str) -> str:
        """End a session, and return the header that makes the browser forget it."""
        ended = self._of(cookies)
        self._inside = [each for each in self._inside if each not in ended]
        return f"{self.cookie}=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0"

    def _of(self, cookies: str) -> list[_Session]:
        given = _hash(_value(cookies, self.cookie))
        # All are compared, whichever it is.
        return [each for each in self._inside if hmac.compare_digest(given, each.key)]


def _value(cookies: str, name: str) -> str:
    # Other programs of this machine set cookies too, which may be anything.
    for each in cookies.split(";"):
        try:
            found = SimpleCookie(each.strip()).get(name)
        except CookieError:
            continue
        if found is not None:
            return found.value
    return ""


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()
