"""A tiny model behind the application, and a caller of it without any network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mst.data.template import load_template
from mst.data.tokens import TextTokenizer, load_tokenizer
from mst.serve.engine import Engine
from mst.serve.http.access import Keys, Names
from mst.serve.http.app import App
from mst.serve.http.limits import Limits
from mst.serve.http.prompts import Reader
from mst.serve.http.service import Service

HELLO = [{"role": "user", "content": "my card is late"}]


@pytest.fixture(scope="session")
def served_model(tiny_model_with_context: Callable[[int], Path]) -> Path:
    """The tiny model, which reads so much that a test can stop it in the middle."""
    return tiny_model_with_context(4096)


@pytest.fixture(scope="session")
def tokenizer(served_model: Path) -> TextTokenizer:
    return load_tokenizer(served_model)


@pytest.fixture(scope="session")
def engine(served_model: Path, tokenizer: TextTokenizer) -> Iterator[Engine]:
    """The real engine with the tiny model; it reads 512 tokens here."""
    import torch
    from transformers import AutoModelForCausalLM

    from mst.serve.asking import way_of
    from mst.serve.constraint import Constrainer
    from mst.serve.continuous import ContinuousEngine
    from mst.serve.continuous import Limits as EngineLimits
    from mst.serve.decoders import Served
    from mst.serve.row_adapters import RowAdapters

    loaded: Any = AutoModelForCausalLM.from_pretrained(served_model)
    model: torch.nn.Module = loaded.eval()
    served = Served(model, torch.device("cpu"), torch.float32, RowAdapters(model))
    constrainer = Constrainer(tokenizer.tokenizer, tokenizer.eos_token_ids, 6400)
    made = ContinuousEngine(served, way_of(served, 512).decoder, 512, EngineLimits(), constrainer)
    yield made
    made.close()


@dataclass
class Reply:
    """An answer as it was sent."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.chunks))

    @property
    def text(self) -> str:
        return b"".join(self.chunks).decode()

    @property
    def error(self) -> dict[str, Any]:
        """Its error, of which every field is there."""
        found: dict[str, Any] = self.json["error"]

        assert set(found) == {"message", "type", "param", "code"}
        return found

    @property
    def events(self) -> list[Any]:
        """The events of a stream, without the last, which ends it."""
        lines = self.text.split("\n\n")

        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(each.removeprefix("data: ")) for each in lines[:-2]]


class Caller:
    """Calls an application as uvicorn does."""

    def __init__(self, app: App) -> None:
        self.app = app

    def post(self, path: str, body: object, **more: Any) -> Reply:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | more.pop("headers", {})
        return self.call("POST", path, raw, headers, **more)

    def get(self, path: str, **headers: str) -> Reply:
        return self.call("GET", path, b"", headers)

    def chat(self, **more: Any) -> Reply:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0} | more
        return self.post("/v1/chat/completions", body)

    def call(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: dict[str, str],
        leave_after: int | None = None,
        pieces: int = 1,
        stall: bool = False,
        read: int | None = None,
    ) -> Reply:
        """Call it once.

        Args:
            method: of HTTP.
            path: that is asked.
            body: all of it.
            headers: beside Host.
            leave_after: messages of the answer after which the caller goes away; 0 for one that
                goes when the engine has begun.
            pieces: in which the body comes.
            stall: the last piece never comes.
            read: messages of the answer after which the caller stays and reads no more.
        """
        return asyncio.run(
            self._call(method, path, body, headers, leave_after, pieces, stall, read)
        )

    async def _call(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: dict[str, str],
        leave_after: int | None,
        pieces: int,
        stall: bool,
        read: int | None,
    ) -> Reply:
        left = asyncio.Event()
        size = -(-len(body) // pieces) or 1
        waiting = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
        reply = Reply(0, {})
        sent = 0

        async def receive() -> MutableMapping[str, Any]:
            if waiting and not (stall and len(waiting) == 1):
                piece = waiting.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(waiting)}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            nonlocal sent
            if sent == read:
                await asyncio.Event().wait()
            sent += 1
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers |= {
                    name.decode(): value.decode() for name, value in message["headers"]
                }
            else:
                reply.chunks.append(message["body"])
                if not message["more_body"]:
                    left.set()
            if sent == leave_after:
                left.set()

        given = {"host": "127.0.0.1:8000"} | headers
        scope = {
            "type": "http", "method": method, "path": path, "scheme": "http",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }  # fmt: skip
        leaving = asyncio.create_task(self._leave(left)) if leave_after == 0 else None
        await self.app(scope, receive, send)
        if leaving is not None:
            leaving.cancel()
        return reply

    async def _leave(self, left: asyncio.Event) -> None:
        """Go away when the engine has begun."""
        while not self.app.service.engine.figures().running:
            await asyncio.sleep(0.005)
        left.set()


@pytest.fixture(scope="session")
def reader(served_model: Path, tokenizer: TextTokenizer, engine: Engine) -> Reader:
    return Reader(tokenizer, load_template(served_model), engine.context)


@pytest.fixture(scope="session")
def called_once(engine: Engine, reader: Reader) -> Callable[..., Caller]:
    """Return a function that makes an application, with other access or limits."""

    def make(
        keys: Path | None = None, names: Names | None = None, web: bool = False, **limits: Any
    ) -> Caller:
        service = Service("tiny", engine, reader, limits.get("most_tokens", 64))
        return Caller(App(service, names or Names(), Keys(keys), Limits(**limits), web=web))

    return make


@pytest.fixture
def called(called_once: Callable[..., Caller]) -> Callable[..., Caller]:
    return called_once


@pytest.fixture
def api(called: Callable[..., Caller]) -> Caller:
    return called()
