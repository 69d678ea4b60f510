"""Run as `python -I -S relay.py LISTENER CONTROL USERS SERVER [SOCKET]`: carries bytes across the
jail's wall.

A socket of the machine's network must never come into the jail: an accepted one can be taken off
its peer and connected anywhere (connect(2), AF_UNSPEC). So this process, outside, accepts, and
hands the bytes on to the server's unix socket. It reads nothing into them; TLS ends inside.

It imports little and takes turns by itself: asyncio alone would be 5 of 15 MB.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import suppress

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

# Yields what it waits for: a descriptor, POLLIN or POLLOUT, and until when at the latest.
Task = Generator[tuple[int, int, float], None, None]
_EVER = float("inf")


class Turns:
    """Goes on with tasks as the descriptors that they wait for are ready."""

    def __init__(self) -> None:
        """There are no tasks yet."""
        self._poll = select.poll()
        self._waiting: dict[tuple[int, int], tuple[Task, float]] = {}

    def go_on(self, task: Task) -> None:
        """Let a task run until it waits or ends."""
        for descriptor, event, until in task:
            self._waiting[descriptor, event] = task, until
            self._watch(descriptor)
            return

    def cancel(self, task: Task) -> None:
        """End a task where it waits; one that has ended stays so."""
        for place, (each, _) in list(self._waiting.items()):
            if each is task:
                del self._waiting[place]
                self._watch(place[0])
        task.close()

    def take(self, until: float = _EVER) -> None:
        """Go on with all that is ready, or that has waited long enough; wait for one such."""
        soonest = min((each for _, each in self._waiting.values()), default=_EVER)
        seconds = min(soonest, until) - time.monotonic()
        ready = self._poll.poll(None if seconds == _EVER else max(0.0, seconds) * 1000)
        for descriptor, events in ready:
            for event in (select.POLLIN, select.POLLOUT):
                # An error or a hang-up is what a read or a write then meets.
                if events & ~(select.POLLIN | select.POLLOUT) or events & event:
                    found = self._waiting.pop((descriptor, event), None)
                    self._watch(descriptor)
                    if found:
                        self.go_on(found[0])
        now = time.monotonic()
        for task in [each for each, late in self._waiting.values() if late <= now]:
            self.cancel(task)

    def _watch(self, descriptor: int) -> None:
        events = (select.POLLIN, select.POLLOUT)
        wanted = sum(each for each in events if (descriptor, each) in self._waiting)
        if wanted:
            self._poll.register(descriptor, wanted)
        else:
            with suppress(KeyError):
                self._poll.unregister(descriptor)


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
        self._turns = Turns()
        self._connections = 0
        self._ready = self._ended = False
        self._accepting: Task | None = None

    def carry(self, control: int) -> None:
        """Carry connections until the control pipe ends; `control` is its reading end."""
        self._turns.go_on(self._obey(control))
        while not self._ended:
            self._turns.take()
        self._stop()
        # What is still to be carried once the server has ended.
        until = time.monotonic() + _LINGER_SECONDS + 1
        while self._connections and time.monotonic() < until:
            self._turns.take(until)

    def _obey(self, control: int) -> Task:
        """Do what the server writes, until it has ended."""
        while not self._ended:
            yield control, select.POLLIN, _EVER
            words = os.read(control, 64)
            self._ended = not words
            for word in words:
                self._told(bytes([word]))

    def _told(self, word: bytes) -> None:
        if word == READY:
            self._ready = True
            self._go_on_accepting()
        elif word == STOP:
            self._stop()

    def _stop(self) -> None:
        """Accept nothing more; what is connected goes on."""
        self._ready = False
        if self._accepting is not None:
            self._turns.cancel(self._accepting)
        # While the socket is open no other file has its number.
        if self._path is not None and self._own is not None and _file_of(self._path) == self._own:
            with suppress(OSError):
                os.unlink(self._path)
        self._path = None
        self._listener.close()

    def _go_on_accepting(self) -> None:
        if self._ready and self._accepting is None and self._connections < _MOST:
            self._accepting = self._accept()
            self._turns.go_on(self._accepting)

    def _accept(self) -> Task:
        """Accept until there are as many as may be; when one ends, this begins anew."""
        while self._connections < _MOST:
            yield self._listener.fileno(), select.POLLIN, _EVER
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError:  # this process may open no more files
                if not self._connections:
                    raise
                break
            self._turns.go_on(self._carry(client))
        self._accepting = None

    def _carry(self, client: socket.socket) -> Task:
        self._connections += 1
        try:
            with suppress(OSError), client:
                client.setblocking(False)
                yield from self._carried(client)
        finally:
            self._connections -= 1
            self._go_on_accepting()

    def _carried(self, client: socket.socket) -> Task:
        if client.family != socket.AF_UNIX:
            # Tokens are few bytes each, and are to be seen as they come.
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._users and user_of(client) not in self._users:
            yield from _turn_away(client)
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.setblocking(False)
            # At once, or not at all: unix(7).
            server.connect(self._server)
            asking = _asked(client, server)
            self._turns.go_on(asking)
            try:
                yield from _answered(server, client)
            finally:
                self._turns.cancel(asking)
            yield from _linger(client)


def _file_of(path: str | None) -> tuple[int, int] | None:
    """Return what tells a file from all others while it is there."""
    try:
        found = os.lstat(path or "")
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _turn_away(client: socket.socket) -> Task:
    yield from _sent(client, _STRANGER)
    client.shutdown(socket.SHUT_WR)
    yield from _linger(client)


def user_of(client: socket.socket) -> int | None:
    """Return the number of the user of this machine who has connected; None if it isn't known."""
    if client.family == socket.AF_UNIX:
        found = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int(struct.unpack("3i", found)[1])
    theirs = _in_table(client.family, client.getpeername())
    ours = _in_table(client.family, client.getsockname())
    with open(_TABLES[socket.AddressFamily(client.family)], encoding="ascii") as table:
        for line in table:
            words = line.split()
            if words[1:3] == [theirs, ours]:
                return int(words[7])
    return None


def _in_table(family: int, place: tuple[str, int]) -> str:
    """Return an address as the kernel's table has it: words of 32 bits in the machine's order."""
    raw = socket.inet_pton(family, place[0].partition("%")[0])
    words = struct.unpack(f"={len(raw) // 4}I", raw)
    return "".join(f"{each:08X}" for each in words) + f":{place[1]:04X}"


def _asked(client: socket.socket, server: socket.socket) -> Task:
    """Carry what a client says; its going away is told, so that nothing is computed for nobody."""
    with suppress(OSError):
        yield from _copy(client, server)
    with suppress(OSError):
        server.shutdown(socket.SHUT_WR)


def _answered(server: socket.socket, client: socket.socket) -> Task:
    with suppress(OSError):
        yield from _copy(server, client)
    with suppress(OSError):
        client.shutdown(socket.SHUT_WR)


def _copy(source: socket.socket, target: socket.socket) -> Task:
    while True:
        yield source.fileno(), select.POLLIN, _EVER
        try:
            block = source.recv(_BLOCK)
        except BlockingIOError:
            continue
        if not block:
            return
        yield from _sent(target, block)


def _sent(target: socket.socket, block: bytes) -> Task:
    left = memoryview(block)
    while left:
        try:
            left = left[target.send(left) :]
        except BlockingIOError:
            yield target.fileno(), select.POLLOUT, _EVER


def _linger(client: socket.socket) -> Task:
    until = time.monotonic() + _LINGER_SECONDS
    while time.monotonic() < until:
        yield client.fileno(), select.POLLIN, until
        with suppress(BlockingIOError):
            if not client.recv(_BLOCK):
                return


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
            Relay(made, server, known, *path).carry(int(control))
        finally:
            with suppress(OSError):
                os.unlink(server)
                os.rmdir(os.path.dirname(server))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
