"""A hub that speaks ModelScope's API, asked through its own library, modelscope-hub."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO

import mst
from mst.hub.guard import check_url
from mst.hub.source import HubFile, HubRefused, Listing

if TYPE_CHECKING:
    from mst.hub.worker import Asked, Wanted

_CHUNK = 1 << 18
_TRIES = 5


def listing(asked: Asked) -> Listing:
    """Return a repository's files with their sizes and hashes."""
    revision = asked.revision or "master"
    entries = _api(asked).list_repo_files(asked.repository, "model", revision=revision)
    return Listing(revision, tuple(_file(each) for each in entries if not each.is_dir))


def _file(entry: Any) -> HubFile:
    return HubFile(str(entry.path), int(entry.size), str(entry.sha256 or ""))


def fetch(asked: Asked, wanted: Wanted, revision: str, file: BinaryIO, have: int) -> None:
    """Add to a file what it lacks; a connection that breaks is taken up again five times."""
    import requests
    from modelscope_hub.errors import NetworkError

    api = _api(asked)
    tries = _TRIES
    while have < wanted.bytes or not wanted.bytes:
        before = have
        trouble: Exception | None = None
        try:
            _some(api, asked, wanted, revision, file, have)
        except (requests.RequestException, NetworkError) as error:
            trouble = error
        have = file.seek(0, os.SEEK_END)
        if not wanted.bytes and trouble is None:
            return
        tries = _TRIES if have > before else tries - 1
        if tries == 0:
            raise trouble or HubRefused(204)


def _some(api: Any, asked: Asked, wanted: Wanted, revision: str, file: BinaryIO, have: int) -> None:
    """Add what one answer brings."""
    # A range of compressed bytes would be no range of the file.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    answer = api.legacy.download_stream(
        asked.repository, "model", wanted.name, revision=revision, headers=headers
    )
    with answer:
        if have and answer.status_code != 206:  # it sends the whole file again
            file.truncate(0)
        for chunk in answer.iter_content(_CHUNK):
            file.write(chunk)


@lru_cache(maxsize=1)
def _api(asked: Asked) -> Any:
    """Return the library's client; requests to other hosts are refused before they are sent."""
    import requests
    from modelscope_hub import HubApi
    from modelscope_hub.config import HubConfig

    send = requests.Session.send

    def guarded(
        session: requests.Session, request: requests.PreparedRequest, **more: Any
    ) -> requests.Response:
        check_url(request.url or "", asked.allowed)
        # Theirs has a number that stays with this user, the kernel and the processor.
        request.headers["User-Agent"] = f"mst/{mst.__version__}"
        return send(session, request, **more)

    # Of all sessions, those for redirects too: this process asks nobody else.
    setattr(requests.Session, "send", guarded)  # noqa: B010
    # An empty token is none; without it the library takes the one of a saved login.
    return HubApi(HubConfig(endpoint=asked.endpoint, token=asked.token or ""))
