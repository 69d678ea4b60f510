"""Runs as a page finds them, and a caller of its server without any network."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from tests.core.serve.http.conftest import Reply

from mst import rundir
from mst.ui.app import App
from mst.ui.index import id_of
from mst.ui.job import Places, UiJob
from mst.ui.sessions import Sessions

PORT = 8123
HOST = f"127.0.0.1:{PORT}"


class Page:
    """Calls the server as a browser does that is in."""

    def __init__(self, app: App, links: list[str]) -> None:
        self.app, self.links = app, links
        self.cookie = ""

    def enter(self) -> Page:
        reply = self.post("/api/session", {"token": self.links[-1]})

        assert reply.status == 200, reply.text
        self.cookie = reply.headers["set-cookie"].partition(";")[0]
        return self

    def get(self, path: str, events: int = 0, meanwhile: Any = None, **headers: str) -> Reply:
        """Ask; of a stream, go away after so many events, with something done after the first."""
        return asyncio.run(self.call("GET", path, b"", headers, events, meanwhile))

    def post(self, path: str, body: object, **headers: str) -> Reply:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json", "origin": f"http://{HOST}"} | headers
        return asyncio.run(self.call("POST", path, raw, given, 0, None))

    async def call(
        self, method: str, path: str, body: bytes, headers: dict[str, str], events: int,
        meanwhile: Any,
    ) -> Reply:  # fmt: skip
        left = asyncio.Event()
        reply, waiting = Reply(0, {}), [body]

        async def receive() -> MutableMapping[str, Any]:
            if waiting:
                return {"type": "http.request", "body": waiting.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                found = message["headers"]
                reply.headers |= {name.decode(): value.decode() for name, value in found}
                return
            reply.chunks.append(message["body"])
            if len(reply.chunks) == 1 and meanwhile is not None:
                meanwhile()
            if not message["more_body"] or len(reply.chunks) == events:
                left.set()

        given = {"host": HOST, "cookie": self.cookie} | headers
        path, _, query = path.partition("?")
        scope = {
            "type": "http", "method": method, "path": path, "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in given.items() if value],
        }  # fmt: skip
        await asyncio.wait_for(self.app(scope, receive, send), 30)
        return reply


@pytest.fixture
def runs(finished_run: Path, tmp_path: Path) -> Path:
    """Two finished runs, one that was killed, a torn one, and what is none."""
    root = tmp_path / "runs"
    for index, name in enumerate(("first", "second", "killed", "torn")):
        shutil.copytree(finished_run, root / name)
        rundir.update_manifest(root / name, created=f"2026-0{index + 1}-01T00:00:00+00:00")
    rundir.update_manifest(root / "killed", status="running", results={})
    (root / "torn" / "run.json").write_text('{"status": "do')
    (root / "photos").mkdir()
    (root / ".hidden").mkdir()
    return root


@pytest.fixture
def opened(runs: Path, tmp_path: Path) -> Callable[..., Page]:
    """Return a function that makes a page's server, before anybody has come in."""

    def make(**more: Any) -> Page:
        places = more.pop("places", Places((str(runs),)))
        given: dict[str, Any] = {"language": "auto", "samples": False, "actions": True} | more
        job = UiJob(places, PORT, audit=str(tmp_path / "audit"), **given)
        links: list[str] = []
        return Page(App(job, Sessions(PORT, links.append), None), links)

    return make


@pytest.fixture
def page(opened: Callable[..., Page]) -> Page:
    return opened().enter()


def path_of(run: Path) -> str:
    return f"/api/runs/{id_of(run)}"
