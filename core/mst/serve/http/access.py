"""Who may ask: the names that the server goes by, the pages that may call it, and API keys."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mst.errors import MstError
from mst.serve import api_keys
from mst.serve.api_keys import ApiKey
from mst.serve.http.listening import LOOPBACK
from mst.serve.http.page import PAGES
from mst.serve.http.quota import Quota
from mst.serve.http.refusals import Refusal
from mst.serve.http.wire import Exchange

# Answered without a key: they say nothing of anybody, and the page asks for one itself.
OPEN_ROUTES = frozenset({"/health", "/ready", "/openapi.json", *PAGES})


@dataclass(frozen=True)
class Names:
    """What a request may call this server.

    Attributes:
        hosts: names and addresses, in lower case.
        any_address: a number of any machine will do: bound beyond loopback, and a page that
            turns its own name round (DNS rebinding) has a name and no number.
        any_name: it is a unix socket, which no page can reach.
    """

    hosts: tuple[str, ...] = LOOPBACK
    any_address: bool = False
    any_name: bool = False


def check_names(names: Names, exchange: Exchange) -> None:
    """Refuse what a page of another site sends to this machine, under whatever name.

    Raises:
        Refusal: Host or Origin is not this server.
    """
    host = exchange.headers.get("host", "")
    if not names.any_name and not _is_ours(names, host):
        raise Refusal(
            403,
            "the Host of this request is no name of this server. Ask it as 127.0.0.1 or localhost;"
            " `mst serve --server-name NAME` adds a name.",
            code="host_not_allowed",
        )
    origin = exchange.headers.get("origin")
    if origin is not None and origin.lower() != f"{exchange.scheme}://{host}".lower():
        raise Refusal(
            403,
            "pages of other sites may not call this server: the Origin of this request is not its"
            " own.",
            code="origin_not_allowed",
        )


def _is_ours(names: Names, host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if "@" in host or "," in host:
        return False
    if name.rstrip(".") in names.hosts:
        return True
    if names.any_address:
        with suppress(ValueError):
            ipaddress.ip_address(name)
            return True
    return False


class Keys:
    """The keys in a file, read again whenever it changes."""

    def __init__(self, path: Path | None) -> None:
        """Read them; None asks for no key."""
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: Sequence[ApiKey] = ()
        self.quota = Quota()

    def check(self, exchange: Exchange) -> None:
        """Find out whose key a request has, put it there, and count the request.

        Raises:
            Refusal: it has none, a wrong one, or has asked too often.
        """
        if self._path is None or exchange.route in OPEN_ROUTES:
            return
        scheme, _, given = exchange.headers.get("authorization", "").partition(" ")
        key = None
        if scheme.lower() == "bearer":
            key = api_keys.owner(self._read(self._path), given.strip())
        if key is None:
            raise Refusal(
                401,
                "this server asks for an API key, and this request has none that it knows. Send the"
                " header Authorization: Bearer mst-…; the server's owner makes keys with `mst"
                " apikeys add NAME`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        exchange.key = key
        if exchange.method == "POST":
            self.quota.ask(key)

    def _read(self, path: Path) -> Sequence[ApiKey]:
        try:
            found = os.stat(path)
            stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
            if stamp != self._stamp:
                self._keys = api_keys.read(path)
                self._stamp = stamp
        except (OSError, MstError):
            # Gone, or not to be trusted: then nobody's key is good.
            self._keys, self._stamp = (), None
        return self._keys


def may_ask(key: ApiKey | None, model: str) -> bool:
    """Return whether a caller may ask a model."""
    return key is None or not key.models or model in key.models
