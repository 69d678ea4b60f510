"""Run as `python -I -S relay.py LISTENER CONTROL USERS SERVER [SOCKET]`: carries bytes across the
jail's wall.

A socket of the machine's network must never come into the jail: an accepted one can be taken off
its peer and connected anywhere (connect(2), AF_UNSPEC). So this process, outside, accepts, and
hands the bytes on to the server's unix socket. It reads nothing into them; TLS ends inside.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # asyncio loads OpenSSL where it finds it: 5 of this process's 20 MB, and TLS ends inside.
    sys.modules["ssl"] = None  # type: ignore[assignment]

import asyncio
import os
import signal
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# What the server writes into the control pipe; its end says that the server has ended.
READY, STOP = b"r", b"s"
_BLOCK = 1 << 16
# Connections at once; more wait in the kernel's queue.
_MOST = 512
# A client that still sends a body nobody wants would lose the refusal to a reset connection, so
# the rest is read and dropped for a while (RFC 9112, 9.6).
_LINGER_SECONDS = 2.0


# To another user of this machine, where no key tells users apart.
_STRANGER = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    b'{"error":{"message":"this server asks for no API key, so that it is for the user who has'
    b' started it alone. Ask that user for one with keys: mst serve --api-keys require.","type":'
    b'"invalid_request_error","param":null,"code":"other_user"}}'
)
# Of one connection's end: address and port in hex, the other's, and whose it is (proc(5)).
_TABLES = {socket.AF_INET: "/proc/net/tcp", socket.AF_INET6: "/proc/net/tcp6"}


class Relay:
    """Accepts connections and carries their bytes."""

    def __init__(
        self, listener: socket.socket, server: str, users: frozenset[int], path: str | None = None
    ) -> None:
        """Carry from `listener` to the unix socket at the path `server`.

        Args:
            listener: who connects to it waits until the server has said that it is ready.
            server: path of the server's socket.
            users: numbers of the users of this machine who may come in; empty for all.
            path: of the listener, where that is a unix socket; it goes when nothing more is
                accepted, so that another server's may take its place.
        """
        self._path, self._own = path, _file_of(path)
        self._listener = listener
        self._server = server
        self._users = users
        self._connections: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    def told(self, word: bytes) -> None:
        """Do what the server has written."""
        if word == READY and self._accepting is None:
            self._accepting = asyncio.get_running_loop().create_task(self._accept())
        elif word == STOP:
            self.stop()

    def stop(self) -> None:
        """Accept nothing more; what is connected goes on."""
        if self._accepting is not None:
            self._accepting.cancel()
        # While the socket is open no other file has its number.
        if self._path is not None and self._own is not None and _file_of(self._path) == self._own:
            with suppress(OSError):
                os.unlink(self._path)
        self._path = None
        self._listener.close()

    async def finish(self) -> None:
        """Wait for what is still to be carried once the server has ended."""
        if self._connections:
            await asyncio.wait(self._connections, timeout=_LINGER_SECONDS + 1)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        room = asyncio.Semaphore(_MOST)
        while True:
            await room.acquire()
            client, _ = await loop.sock_accept(self._listener)
            task = loop.create_task(self._carry(client))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
            task.add_done_callback(lambda _: room.release())

    async def _carry(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with client, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            client.setblocking(False)
            server.setblocking(False)
            if client.family != socket.AF_UNIX:
                # Tokens are few bytes each, and are to be seen as they come.
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(OSError):
                if self._users and user_of(client) not in self._users:
                    await _turn_away(client)
                    return
                await loop.sock_connect(server, self._server)
                asking = loop.create_task(_asked(client, server))
                try:
                    await _answered(server, client)
                finally:
                    asking.cancel()
                    with suppress(asyncio.CancelledError):
                        await asking
                await _linger(client)


def _file_of(path: str | None) -> tuple[int, int] | None:
    """Return what tells a file from all others while it is there."""
    try:
        found = os.lstat(path or "")
    except OSError:
        return None
    return found.st_dev, found.st_ino


async def _turn_away(client: socket.socket) -> None:
    await asyncio.get_running_loop().sock_sendall(client, _STRANGER)
    client.shutdown(socket.SHUT_WR)
    await _linger(client)


def user_of(client: socket.socket) -> int | None:
    """Return the number of the user of this machine who has connected; None if it isn't known."""
    if client.family == socket.AF_UNIX:
        found = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int(struct.unpack("3i", found)[1])
    theirs = _in_table(client.family, client.getpeername())
    ours = _in_table(client.family, client.getsockname())
    for line in Path(_TABLES[socket.AddressFamily(client.family)]).read_text("ascii").splitlines():
        words = line.split()
        if words[1:3] == [theirs, ours]:
            return int(words[7])
    return None


def _in_table(family: int, place: tuple[str, int]) -> str:
    """Return an address as the kernel's table has it: words of 32 bits in the machine's order."""
    raw = socket.inet_pton(family, place[0].partition("%")[0])
    words = struct.unpack(f"={len(raw) // 4}I", raw)
    return "".join(f"{each:08X}" for each in words) + f":{place[1]:04X}"


async def _asked(client: socket.socket, server: socket.socket) -> None:
    """Carry what a client says; its going away is told, so that nothing is computed for nobody."""
    with suppress(OSError):
        await _copy(client, server)
    with suppress(OSError):
        server.shutdown(socket.SHUT_WR)


async def _answered(server: socket.socket, client: socket.socket) -> None:
    with suppress(OSError):
        await _copy(server, client)
    with suppress(OSError):
        client.shutdown(socket.SHUT_WR)


async def _copy(source: socket.socket, target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while block := await loop.sock_recv(source, _BLOCK):
        await loop.sock_sendall(target, block)


async def _linger(client: socket.socket) -> None:
    loop = asyncio.get_running_loop()

    async def drop() -> None:
        while await loop.sock_recv(client, _BLOCK):
            pass

    with suppress(OSError, asyncio.TimeoutError):
        await asyncio.wait_for(drop(), _LINGER_SECONDS)


async def carry(
    listener: socket.socket,
    control: int,
    server: str,
    users: frozenset[int] = frozenset(),
    path: str | None = None,
) -> None:
    """Carry connections until the control pipe ends; `control` is its reading end, and the other
    arguments are `Relay`'s.
    """
    loop = asyncio.get_running_loop()
    relay, ended = Relay(listener, server, users, path), asyncio.Event()

    def read() -> None:
        words = os.read(control, 64)
        if not words:
            loop.remove_reader(control)
            ended.set()
        for word in words:
            relay.told(bytes([word]))

    loop.add_reader(control, read)
    await ended.wait()
    relay.stop()
    await relay.finish()


def main(argv: Sequence[str]) -> int:
    """Carry connections; remove the paths of both sockets, which the jail may not."""
    # Ctrl-C and SIGTERM are the server's to answer: streams are finished first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    listener, control, users, server, *path = argv
    known = frozenset(int(each) for each in users.split(",") if each)
    with socket.socket(fileno=int(listener)) as made:
        made.setblocking(False)
        try:
            asyncio.run(carry(made, int(control), server, known, *path))
        finally:
            with suppress(OSError):
                os.unlink(server)
                os.rmdir(os.path.dirname(server))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
