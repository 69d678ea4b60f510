"""A hub that speaks Hugging Face's API, asked through huggingface_hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO

import mst
from mst.hub.guard import check_url
from mst.hub.source import HubFile, Listing

if TYPE_CHECKING:
    from mst.hub.worker import Asked, Wanted

_SECONDS = 30
_CHUNK = 1 << 18


def listing(asked: Asked) -> Listing:
    """Return a repository's files with their sizes and hashes."""
    from huggingface_hub import HfApi

    _guard(asked)
    api = HfApi(
        endpoint=asked.endpoint,
        token=asked.token or False,
        library_name="mst",
        library_version=mst.__version__,
    )
    found = api.model_info(
        asked.repository, revision=asked.revision, files_metadata=True, timeout=_SECONDS
    )
    card: Any = found.card_data
    licence = card.get("license") if card is not None else None
    return Listing(str(found.sha), tuple(map(_file, found.siblings or ())), str(licence or "")[:80])


def _file(entry: Any) -> HubFile:
    digest = "" if entry.lfs is None else str(entry.lfs.sha256)
    return HubFile(str(entry.rfilename), int(entry.size or 0), digest, str(entry.blob_id or ""))


def fetch(asked: Asked, wanted: Wanted, revision: str, file: BinaryIO, have: int) -> None:
    """Add to a file what it lacks; a connection that breaks is taken up again five times.

    Some versions of `hf_hub_download` begin each file anew, so what it downloads with is called.
    """
    from huggingface_hub import constants, hf_hub_url, utils
    from huggingface_hub.file_download import http_get

    url = hf_hub_url(asked.repository, wanted.name, revision=revision, endpoint=asked.endpoint)
    untyped: Any = utils
    headers = untyped.build_hf_headers(
        token=asked.token or False, library_name="mst", library_version=mst.__version__
    )
    # What is less than a chunk is lost when the connection breaks: theirs has 10 MB.
    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK
    # A range of compressed bytes would be no range of the file.
    headers["Accept-Encoding"] = "identity"
    http_get(url, file, resume_size=have, headers=headers, expected_size=wanted.bytes)


def _guard(asked: Asked) -> None:
    """Let the library's client refuse requests to other hosts before it connects to them."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def look(request: Any) -> None:
        check_url(str(request.url), asked.allowed)

    def factory() -> Any:
        client = default_client_factory()
        hooks = client.event_hooks
        hooks["request"].insert(0, look)
        client.event_hooks = hooks
        return client

    set_client_factory(factory)
