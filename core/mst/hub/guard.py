"""Keeps a process to the hosts that its user named: by their names, and by their addresses.

Each request is looked at before it is sent, redirects among them. Below that, no other name is
looked up and no address connected to that a look-up of an allowed name did not return, whichever
library asks.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Container
from typing import Any
from urllib.parse import urlsplit

from mst.loopback import is_loopback


class HostRefused(Exception):
    """A host was to be asked that the user has not named.

    Not an OSError, which libraries take for a failed connection that is tried again.
    """

    def __init__(self, host: str, plain: bool = False) -> None:
        """Keep the host's name, and whether it is refused for a connection without encryption."""
        super().__init__(host)
        self.host = host
        self.plain = plain


def check_url(url: str, allowed: Container[str]) -> None:
    """Raise HostRefused for a request to a host that is not among the allowed ones.

    Nor is an allowed one asked without encryption, where a redirect leads from https to http.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if host not in allowed:
        raise HostRefused(host)
    if parts.scheme != "https" and not is_loopback(host):
        raise HostRefused(host, plain=True)


def close_others(allowed: Container[str]) -> None:
    """Keep this process from every other host, until it ends.

    Args:
        allowed: names of hosts, in lower case, or addresses.
    """
    look_up = socket.getaddrinfo
    known: set[str] = set()

    def getaddrinfo(host: Any, *rest: Any, **more: Any) -> Any:
        found = look_up(host, *rest, **more)
        known.update(str(each[4][0]) for each in found)
        return found

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            host = arguments[0]
            name = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
            if name.lower() not in allowed:
                raise HostRefused(name)
        elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            place = arguments[1]
            # Another family than the internet's leads to no other machine.
            if isinstance(place, tuple) and place and str(place[0]) not in known:
                raise HostRefused(str(place[0]))

    socket.getaddrinfo = getaddrinfo
    sys.addaudithook(look)
