"""Asking an engine over HTTP: on its unix socket or port, one connection a request.

A connection ends with its request, so that an engine hears at once of a caller who went away.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import h11

from mst.serve.engine import EngineFailure

_BLOCK = 1 << 16
# Of a whole answer, and of one event: an engine that has gone astray must not fill the memory.
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Address:
    """Where an engine listens: the path of a unix socket, or a port of 127.0.0.1."""

    socket: str | None = None
    port: int | None = None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def answers(address: Address, path: str, seconds: float) -> bool:
    """Return whether an engine answers a path with 200 within so many seconds."""
    made: http.client.HTTPConnection
    if address.socket is not None:
        made = _UnixConnection(address.socket, seconds)
    else:
        made = http.client.HTTPConnection("127.0.0.1", address.port, timeout=seconds)
    try:
        made.request("GET", path, headers={"Connection": "close"})
        found = made.getresponse()
        found.read(_BLOCK)
        return found.status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        made.close()


class Reply:
    """An answer whose body is still to come."""

    def __init__(self, reader: asyncio.StreamReader, connection: h11.Connection) -> None:
        """Read from a connection on which a request was sent."""
        self._reader, self._connection = reader, connection
        self.status = 0

    async def head(self) -> None:
        """Read the head; `status` is set then."""
        event = await self._next()
        while isinstance(event, h11.InformationalResponse):
            event = await self._next()
        if not isinstance(event, h11.Response):
            raise EngineFailure("the engine answered with something that is not HTTP.")
        self.status = event.status_code

    async def blocks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes.

        Raises:
            EngineFailure: it ends before it is whole.
        """
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise _broken()

    async def whole(self) -> bytes:
        """Return the body."""
        body = bytearray()
        async for block in self.blocks():
            body += block
            if len(body) > _MOST_BYTES:
                raise EngineFailure("the engine's answer has no end.")
        return bytes(body)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the data of each server-sent event; the last is [DONE].

        Raises:
            EngineFailure: the stream ends before that.
        """
        held = bytearray()
        async for block in self.blocks():
            held += block
            *lines, rest = held.split(b"\n")
            held = bytearray(rest)
            if len(held) > _MOST_BYTES:
                raise EngineFailure("the engine's answer has no end.")
            for line in lines:
                # Comments keep a connection open, and other fields say nothing that counts here.
                if line.startswith(b"data:"):
                    data = bytes(line[5:].strip())
                    yield data
                    if data == b"[DONE]":
                        return
        raise _broken()

    async def _next(self) -> object:
        try:
            while True:
                event = self._connection.next_event()
                if event is not h11.NEED_DATA:
                    return event
                self._connection.receive_data(await self._reader.read(_BLOCK))
        except (OSError, h11.RemoteProtocolError):
            raise _broken() from None


class Unreachable(EngineFailure):
    """Nothing takes requests where the engine listened: no word of this one has reached it."""


def _broken() -> EngineFailure:
    return EngineFailure("the engine ended before the answer was whole. Ask again.")


@contextlib.asynccontextmanager
async def asked(address: Address, path: str, body: bytes) -> AsyncIterator[Reply]:
    """Send a request of JSON and yield its answer; leaving closes the connection.

    Raises:
        Unreachable: the engine isn't there.
        EngineFailure: it ends.
    """
    try:
        if address.socket is not None:
            reader, writer = await asyncio.open_unix_connection(address.socket)
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
    except OSError:
        raise Unreachable("the engine can't be reached. Ask again.") from None
    connection = h11.Connection(h11.CLIENT)
    try:
        head = h11.Request(
            method="POST",
            target=path,
            headers=[
                ("Host", "localhost"),
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ],
        )
        parts = (head, h11.Data(data=body), h11.EndOfMessage())
        raw = b"".join(connection.send(each) or b"" for each in parts)
        try:
            writer.write(raw)
            await writer.drain()
        except OSError:
            raise _broken() from None
        reply = Reply(reader, connection)
        await reply.head()
        yield reply
    finally:
        # At once, whatever was still to be sent or read.
        writer.transport.abort()
