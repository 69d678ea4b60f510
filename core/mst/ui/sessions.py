"""Who may look: a link that works once, and the session that a browser gets for it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import deque
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie

# Browsers that are in at once; the oldest is out when one more comes.
_MOST = 32


class Sessions:
    """Links and sessions. Neither is kept as it is, but by its hash."""

    def __init__(self, port: int, show: Callable[[str], None]) -> None:
        """Make the first link.

        Args:
            port: of the page. Browsers send cookies to all ports of a host, so its name has it.
            show: shows a person a link's token, the first and each that follows one that was used.
        """
        self.cookie = f"mst-ui-{port}"
        self._show = show
        self._link = b""
        self._inside: deque[bytes] = deque(maxlen=_MOST)
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
        made = secrets.token_urlsafe(32)
        self._inside.append(_hash(made))
        self._new_link()
        return f"{self.cookie}={made}; Path=/; HttpOnly; SameSite=Strict"

    def is_inside(self, cookies: str) -> bool:
        """Return whether a request's cookies have a session."""
        given = _hash(_value(cookies, self.cookie))
        # All are compared, whichever it is.
        return sum(hmac.compare_digest(given, each) for each in tuple(self._inside)) > 0

    def leave(self, cookies: str) -> str:
        """End a session, and return the header that makes the browser forget it."""
        given = _hash(_value(cookies, self.cookie))
        if given in self._inside:
            self._inside.remove(given)
        return f"{self.cookie}=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0"


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
