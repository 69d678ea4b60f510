"""One request and its answer on the wire: ASGI's messages, with limits of size and time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mst.serve.api_keys import ApiKey
from mst.serve.http.refusals import Refusal

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECURITY = [
    # An answer that a browser takes for a page, or keeps, is nobody's wish.
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
]


class Gone(Exception):
    """The caller went away before the answer was whole."""


@dataclass
class Exchange:
    """A request that is being answered.

    Attributes:
        method: of HTTP.
        path: as it was sent.
        headers: lower case names and values.
        scheme: "http" or "https".
        receive: ASGI's.
        send: ASGI's.
        began: `time.monotonic` when it came.
        route: what the log calls its path; never what a caller made up.
        key: of the caller; None without keys.
        status: that was answered; 0 while none was.
        model: that was asked; "" before it is known to exist.
        prompt_tokens: of all of its prompts.
        cached_tokens: of these, kept from before.
        completion_tokens: of all of its answers.
        first_token_seconds: until the first token of an answer; None before.
        unread: the body was not read to its end.
        events: of an answer that is streamed.
        send_seconds: that a caller may take to read what was sent before more can be.
        sending_since: `time.monotonic` when what is being sent was begun; None while nothing is.
        query: what followed "?" in the address.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    scheme: str
    receive: Receive = field(repr=False)
    send: Send = field(repr=False)
    began: float = field(default_factory=time.monotonic)
    route: str = "other"
    key: ApiKey | None = None
    status: int = 0
    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float | None = None
    unread: bool = True
    events: Events | None = field(default=None, repr=False)
    send_seconds: float = 60.0
    sending_since: float | None = None
    query: str = field(default="", repr=False)

    @property
    def verb(self) -> str:
        """Its method as logs have it, which a caller can't make up."""
        return self.method if self.method in _METHODS else "other"

    @property
    def caller(self) -> str:
        """Name of the key; "" for the machine's user."""
        return "" if self.key is None else self.key.name


def exchange_of(scope: Mapping[str, Any], receive: Receive, send: Send) -> Exchange:
    """Return a request as ASGI gives it."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        # Two of one kind could mean one thing here and another in front of us.
        joined = f"{headers[key]}, {value.decode('latin-1')}" if key in headers else None
        headers[key] = value.decode("latin-1") if joined is None else joined
    query = scope.get("query_string", b"").decode("latin-1")
    return Exchange(
        scope["method"], scope["path"], headers, scope.get("scheme", "http"), receive, send,
        query=query,
    )  # fmt: skip


async def read_body(exchange: Exchange, most_bytes: int, seconds: float) -> bytes:
    """Return a request's body.

    Raises:
        Refusal: it is no JSON by its type, too large, or too slow.
        Gone: the caller went away.
    """
    kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also because a page of another site may send text/plain without asking (CORS).
        raise Refusal(415, "send JSON, with the header Content-Type: application/json.")
    too_large = Refusal(
        413, f"a request has {most_bytes} bytes at most here (mst serve --body-size)."
    )
    length = exchange.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most_bytes:
        raise too_large
    try:
        return await asyncio.wait_for(_whole(exchange, most_bytes, too_large), seconds)
    except asyncio.TimeoutError:
        raise Refusal(408, f"the request did not come whole within {seconds:g} s.") from None


async def _whole(exchange: Exchange, most_bytes: int, too_large: Refusal) -> bytes:
    body = bytearray()
    while True:
        message = await exchange.receive()
        if message["type"] == "http.disconnect":
            raise Gone
        body += message.get("body", b"")
        if len(body) > most_bytes:
            raise too_large
        if not message.get("more_body", False):
            exchange.unread = False
            return bytes(body)


async def until_gone(exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, and break it off when the caller goes away, or stays and does not read.

    Raises:
        Gone: the caller went away.
    """

    async def gone() -> None:
        while (await exchange.receive())["type"] != "http.disconnect":
            pass

    async def stalled() -> None:
        waited = 0.0
        while waited < exchange.send_seconds:
            await asyncio.sleep(min(1.0, exchange.send_seconds))
            since = exchange.sending_since
            waited = 0.0 if since is None else time.monotonic() - since

    loop = asyncio.get_running_loop()
    working = loop.create_task(work)
    tasks = [working, loop.create_task(gone()), loop.create_task(stalled())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        working.result()
    finally:
        for each in tasks:
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _send(exchange: Exchange, message: MutableMapping[str, Any]) -> None:
    """Send a message of ASGI's; it waits while the caller does not read."""
    # Not asyncio.wait_for: before Python 3.12 it loses a cancellation that comes as it ends, and
    # an answer would go on for a caller who is gone.
    exchange.sending_since = time.monotonic()
    await exchange.send(message)
    exchange.sending_since = None


async def begin(exchange: Exchange, status: int, kind: str, headers: Mapping[str, str]) -> None:
    """Send the head of an answer."""
    exchange.status = status
    lines = [(b"content-type", kind.encode()), *_SECURITY]
    lines += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    if exchange.unread and exchange.method == "POST":
        # What is left of the body is not read, so nothing can follow it.
        lines.append((b"connection", b"close"))
    await _send(exchange, {"type": "http.response.start", "status": status, "headers": lines})


# One for all: json.dumps makes another for each call that has options.
dumped = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


async def answer_text(
    exchange: Exchange,
    text: str,
    kind: str,
    headers: Mapping[str, str] | None = None,
    status: int = 200,
) -> None:
    """Answer with a text."""
    await _whole_answer(exchange, status, text.encode(), kind, headers or {})


async def answer_json(
    exchange: Exchange, value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> None:
    """Answer with JSON."""
    body = dumped(value).encode("utf-8", "replace")
    await _whole_answer(exchange, status, body, "application/json", headers or {})


async def _whole_answer(
    exchange: Exchange, status: int, body: bytes, kind: str, headers: Mapping[str, str]
) -> None:
    await begin(exchange, status, kind, {**headers, "Content-Length": str(len(body))})
    await _send(exchange, {"type": "http.response.body", "body": body, "more_body": False})


class Events:
    """A stream of server-sent events; its head goes out with the first."""

    def __init__(self, exchange: Exchange) -> None:
        """Nothing is sent yet, so that what is refused can still have its status."""
        self._exchange = exchange

    async def send(self, value: object) -> None:
        """Send one event."""
        await self.send_json(dumped(value))

    async def send_json(self, text: str) -> None:
        """Send one event that is JSON already."""
        await self._send(text.encode("utf-8", "replace"))

    async def end(self) -> None:
        """Send what ends a stream of OpenAI's."""
        await self._send(b"[DONE]")
        last = {"type": "http.response.body", "body": b"", "more_body": False}
        await _send(self._exchange, last)

    async def fail(self, refusal: Refusal) -> None:
        """Send a failure in place of the rest; the status is out already."""
        await self.send(refusal.body())
        await self.end()

    @property
    def begun(self) -> bool:
        """Whether anything was sent."""
        return self._exchange.status != 0

    async def _send(self, data: bytes) -> None:
        if not self.begun:
            await begin(self._exchange, 200, "text/event-stream; charset=utf-8", {})
        await _send(
            self._exchange,
            {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True},
        )
