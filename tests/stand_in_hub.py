"""A hub on loopback that speaks as much of two hubs' APIs as a pull asks for."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

COMMIT = "5" * 40


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class StandIn:
    """What the hub has and how it behaves; what it was asked is kept in `asked`.

    Large files (by `large`) are sent from another name of this machine, as a hub's CDN would.
    Behind each file's own bytes it sends `more` others.
    """

    repository: str
    files: dict[str, bytes]
    large: tuple[str, ...] = ()
    listed: dict[str, bytes] = field(default_factory=dict)
    elsewhere: str = "127.0.0.1"
    status: int = 200
    licence: str = "apache-2.0"
    commit: str = COMMIT
    more: int = 0
    cut_once_after: int | None = None
    chunk: int = 1 << 16
    pause: float = 0.0
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://localhost:{self.port}"

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, content in {**self.files, **self.listed}.items():
            entry: dict[str, Any] = {
                "rfilename": name, "size": len(content), "blobId": git_hash(content),
            }  # fmt: skip
            if name in self.large:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {
            "id": self.repository, "modelId": self.repository, "sha": self.commit, "private": False,
            "tags": [], "downloads": 0, "siblings": siblings,
            "cardData": {"license": self.licence},
        }  # fmt: skip

    def modelscope_files(self) -> dict[str, Any]:
        """Return what ModelScope's listing of files says; it has SHA-256 of all."""
        files = [
            {
                "Path": name, "Name": name, "Size": len(content), "Type": "blob",
                "Sha256": hashlib.sha256(content).hexdigest(),
            }
            for name, content in {**self.files, **self.listed}.items()
        ]  # fmt: skip
        return {"Code": 200, "Success": True, "Data": {"Files": files}}


def _handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            host = (self.headers["Host"] or "").partition(":")[0]
            hub.asked.append((host, self.path, dict(self.headers)))
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{hub.repository}"):
                self._api(path)
            elif path.startswith(f"/{hub.repository}/resolve/{COMMIT}/"):
                self._resolve(path.rpartition("/")[2])
            elif path == f"/api/v1/models/{hub.repository}/repo/files":
                self._answer(200, json.dumps(hub.modelscope_files()).encode(), {})
            elif path == f"/api/v1/models/{hub.repository}/repo":
                self._resolve(parse_qs(urlsplit(self.path).query)["FilePath"][0])
            elif path.startswith("/cdn/"):
                self._send(hub.files[path.rpartition("/")[2]])
            else:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def _api(self, path: str) -> None:
            _, found, revision = path.partition("/revision/")
            if hub.status != 200:
                self._answer(hub.status, b'{"error": "secret zqxvkw text"}', {})
            elif found and revision not in ("main", COMMIT):
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                self._answer(200, json.dumps(hub.info()).encode(), {})

        def _resolve(self, name: str) -> None:
            if name in hub.large:
                place = f"http://{hub.elsewhere}:{hub.port}/cdn/{name}?signature=zqxvkw"
                self._answer(302, b"", {"Location": place})
            else:
                self._send(hub.files[name])

        def _send(self, content: bytes) -> None:
            asked = self.headers.get("Range", "")
            content += b"x" * hub.more
            start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
            body = content[start:]
            self.send_response(206 if asked else 200)
            if asked:
                span = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", span)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut, hub_cut = hub.cut_once_after, False
            for place in range(0, len(body), hub.chunk):
                part = body[place : place + hub.chunk]
                if cut is not None and place + len(part) > cut and len(body) > cut:
                    hub.cut_once_after, hub_cut = None, True
                    part = part[: max(0, cut - place)]
                self.wfile.write(part)
                hub.sent += len(part)
                if hub_cut:
                    self.close_connection = True
                    self.connection.close()
                    return
                time.sleep(hub.pause)

        def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no news."""


@contextmanager
def serving(hub: StandIn) -> Iterator[StandIn]:
    """Serve on loopback while the block runs, under the names localhost and 127.0.0.1."""
    server = _Server(("127.0.0.1", 0), _handler(hub))
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
