"""The process that talks to a hub: it lists a repository, and then fetches what it is told to.

Run as `python -m mst.hub.worker`. Standard input has two lines of JSON: an `Asked`, and, once the
listing was answered, the files to fetch. Standard output has one line of JSON for each answer. No
text of a library or a host is passed on: it might hold a token, or an address that is a secret.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst import serial
from mst.hub.guard import HostRefused, close_others
from mst.hub.source import HUGGING_FACE, HubRefused, Listing

_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ConnectionError", "NewConnectionError")


@dataclass(frozen=True)
class Asked:
    """What to ask of which hub.

    Attributes:
        hub: of `mst.hub.source.HUBS`.
        endpoint: its address.
        repository: "org/name".
        revision: a branch, a tag or a commit; None for the hub's default.
        allowed: the hosts that may be asked, and no others.
        token: sent to the endpoint alone; None for none.
    """

    hub: str
    endpoint: str
    repository: str
    revision: str | None
    allowed: tuple[str, ...]
    token: str | None


@dataclass(frozen=True)
class Wanted:
    """A file to fetch.

    Attributes:
        name: its path in the repository.
        bytes: its size.
        part: the file that it is added to; what is there already is kept.
    """

    name: str
    bytes: int
    part: str


@dataclass(frozen=True)
class ToFetch:
    """All files to fetch, in this order, of one revision."""

    revision: str
    files: tuple[Wanted, ...]


def main() -> int:
    """Answer what standard input asks; every answer is a line of JSON."""
    from mst.seal.redaction import place_of, quieten
    from mst.worker_process import die_with_parent

    quieten()
    # What asks may be killed, and the next one would find a file that two add to.
    die_with_parent()
    asked = serial.loads(Asked, sys.stdin.readline())
    close_others(asked.allowed)
    try:
        _answer(asked)
    except Exception as error:  # whatever a library raises
        status = _status(error)
        refused = _refused(error)
        if refused is not None:
            _say("plain" if refused.plain else "host", refused.host)
        elif status is not None:
            _say("status", status)
        elif _is_unreachable(error):
            _say("unreachable", "")
        else:
            _say("failed", place_of(error))
        return 1
    return 0


def _answer(asked: Asked) -> None:
    if asked.hub == HUGGING_FACE:
        from mst.hub import hugging_face as hub
    else:
        from mst.hub import modelscope as hub  # type: ignore[no-redef]
    listing: Listing = hub.listing(asked)
    _say("listing", serial.to_json(listing))
    line = sys.stdin.readline()
    if not line:  # what was listed is not wanted
        return
    wanted = serial.loads(ToFetch, line)
    for each in wanted.files:
        _say("begun", each.name)
        part = Path(each.part)
        have = part.stat().st_size if part.exists() else 0
        if have > each.bytes:
            part.unlink()
            have = 0
        if have < each.bytes or not part.exists():
            _bound(each.bytes)
            with part.open("ab") as file:
                hub.fetch(asked, each, wanted.revision, file, have)
        _say("done", each.name)


def _bound(size: int) -> None:
    """Let no file grow past a size, whatever a hub sends: Python then raises an OSError."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))


def _say(kind: str, value: Any) -> None:
    print(json.dumps({kind: value}), flush=True)


def _refused(error: BaseException | None) -> HostRefused | None:
    """Return a refused host among what led to an error."""
    while error is not None:
        if isinstance(error, HostRefused):
            return error
        error = error.__cause__ or error.__context__
    return None


def _is_unreachable(error: BaseException | None) -> bool:
    """Return whether no connection came about: httpx and requests have classes of their own."""
    while error is not None:
        if type(error).__name__ in _UNREACHABLE:
            return True
        error = error.__cause__ or error.__context__
    return False


def _status(error: BaseException) -> int | None:
    """Return the status of a hub's answer, where it is that which went wrong."""
    if isinstance(error, HubRefused):
        return error.status
    answer = getattr(error, "response", None)
    status = getattr(error if answer is None else answer, "status_code", None)
    return status if isinstance(status, int) else None


if __name__ == "__main__":
    sys.exit(main())
