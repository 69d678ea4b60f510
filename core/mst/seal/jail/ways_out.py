"""The self-test: the ways out that would work on this machine, tried from inside."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mst.seal.jail import hygiene, kernel
from mst.seal.jail.filters import MSG_FASTOPEN, TIOCSTI
from mst.seal.jail.seal import Way

# Set aside for documentation (RFC 5737, RFC 3849): no machine has them.
NOWHERE, NOWHERE6 = "198.51.100.1", "2001:db8::1"
_SECONDS = 1.0
# A socket's name has room for 107 bytes (unix(7)), which the TMPDIR of a batch system can fill.
_LONGEST_DIRECTORY = 80
_BEGUN = (errno.EINPROGRESS, errno.EALREADY, errno.EAGAIN)
_AF_VSOCK, _AF_BLUETOOTH, _AF_ALG, _AF_RDS, _AF_TIPC, _AF_XDP = 40, 31, 38, 21, 30, 44


@dataclass
class Outside:
    """Listeners outside the jail, each of which can be reached without it.

    Attributes:
        port: on 127.0.0.1.
        path: of a unix socket.
        name: of an abstract one.
        directory: that holds the path.
        process: whose memory and network are to stay out of reach.
    """

    port: int
    path: str
    name: str
    directory: str
    process: int
    sockets: list[socket.socket] = field(default_factory=list)

    def facts(self) -> dict[str, object]:
        """Return what those inside are told."""
        names = ("port", "path", "name", "directory", "process")
        return {name: getattr(self, name) for name in names}

    def close(self) -> None:
        """Close them all."""
        for each in self.sockets:
            each.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def listen_outside() -> Outside:
    """Return open listeners of this process."""
    long = len(os.fsencode(tempfile.gettempdir())) > _LONGEST_DIRECTORY
    directory = tempfile.mkdtemp(prefix="mst-seal-", dir="/tmp" if long else None)
    path, name = f"{directory}/outside", f"mst-{os.getpid()}-outside"
    tcp = socket.socket()
    tcp.bind(("127.0.0.1", 0))
    made = [tcp]
    for address in (path, "\0" + name):
        made.append(socket.socket(socket.AF_UNIX))
        made[-1].bind(address)
    for each in made:
        each.listen(8)
    return Outside(tcp.getsockname()[1], path, name, directory, os.getpid(), made)


def name_servers(file: Path = Path("/etc/resolv.conf")) -> list[str]:
    """Return the addresses that names would be asked of."""
    with suppress(OSError, UnicodeDecodeError):
        words = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        return [
            line[1].partition("%")[0] for line in words if line[:1] == ["nameserver"] and line[1:]
        ]
    return []


def _tcp(address: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as made:
        made.settimeout(_SECONDS)
        made.connect((address, port))


def _udp(address: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as made:
        if not _on_loopback(address):
            made.sendto(b"mst", (address, port))
            return
        # Of a jail's own loopback the kernel says only afterwards that nobody listens.
        made.settimeout(_SECONDS)
        made.connect((address, port))
        made.send(b"mst")
        made.recv(1)


def _on_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _fast_open(address: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as made:
        made.settimeout(_SECONDS)
        made.sendto(b"mst", MSG_FASTOPEN, (address, port))


def _unix(address: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.settimeout(_SECONDS)
        made.connect(address)


def _family(family: int, kind: int, protocol: int = 0) -> None:
    socket.socket(family, kind, protocol).close()


def _families() -> None:
    """Make a socket of any family that leads past the IP stack."""
    for family, kind in (
        (_AF_BLUETOOTH, socket.SOCK_SEQPACKET), (_AF_ALG, socket.SOCK_SEQPACKET),
        (_AF_RDS, socket.SOCK_SEQPACKET), (_AF_TIPC, socket.SOCK_STREAM),
        (_AF_XDP, socket.SOCK_RAW),
    ):  # fmt: skip
        with suppress(OSError):
            _family(family, kind)
            return
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _ring() -> None:
    import ctypes

    number = kernel.system("io_uring_setup", 1, ctypes.create_string_buffer(120))
    os.close(number)


def _inherited(known: Collection[int]) -> None:
    if set(hygiene.open_sockets()) <= set(known):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _turned_round(listener: int, address: str) -> None:
    """Connect with a socket that is there to be connected to, or find that it isn't such a one."""
    with socket.socket(fileno=os.dup(listener)) as made:
        listens = made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if made.family != socket.AF_UNIX or not listens:
            return
        made.settimeout(_SECONDS)
        made.connect(address)


def _namespace_of(process: int) -> None:
    opened = os.open(f"/proc/{process}/ns/net", os.O_RDONLY)
    try:
        kernel.system("setns", opened, kernel.CLONE_NEWNET)
    finally:
        os.close(opened)


def _memory_of(process: int) -> None:
    os.close(os.open(f"/proc/{process}/mem", os.O_RDWR))


def _type_into_terminal() -> None:
    fcntl.ioctl(0, TIOCSTI, b"\0")


def _child(attempt: Callable[[], None]) -> None:
    """Let a child process try, and raise what it met."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        number = 0
        try:
            attempt()
        except OSError as error:
            number = error.errno or errno.ETIMEDOUT
        finally:
            os.write(writing, struct.pack("i", number))
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read(4)
    os.waitpid(child, 0)
    number = struct.unpack("i", answer)[0] if len(answer) == 4 else errno.EIO
    if number:
        raise OSError(number, os.strerror(number))


@dataclass(frozen=True)
class Attempt:
    """One way out.

    Attributes:
        name: what a person calls it.
        take: takes it, or raises OSError.
        here: it leads to a loopback of the jail's own, where nobody listens.
    """

    name: str
    take: Callable[[], None]
    here: bool = False


def attempts(
    outside: Mapping[str, object], loopback: bool, own: int = -1, listeners: Collection[int] = ()
) -> Iterator[Attempt]:
    """Yield every way out that this machine has.

    Args:
        outside: what `Outside.facts` says.
        loopback: 127.0.0.1 outside is another one than inside, or is judged.
        own: a socket that isn't inherited.
        listeners: listening unix sockets that the job takes with it.
    """
    port, process = int(str(outside["port"])), int(str(outside["process"]))
    yield Attempt("tcp", lambda: _tcp(NOWHERE, 443))
    yield Attempt("tcp over ipv6", lambda: _tcp(NOWHERE6, 443))
    yield Attempt("udp", lambda: _udp(NOWHERE, 53))
    yield Attempt("udp over ipv6", lambda: _udp(NOWHERE6, 53))
    for server in name_servers():
        here = _on_loopback(server)
        yield Attempt(f"dns of {server} by udp", partial(_udp, server, 53), here)
        yield Attempt(f"dns of {server} by tcp", partial(_tcp, server, 53), here)
    yield Attempt("tcp fast open", lambda: _fast_open(NOWHERE, 443))
    if loopback:
        yield Attempt("service of this machine on loopback", lambda: _tcp("127.0.0.1", port), True)
        yield Attempt(
            "the same from a child", lambda: _child(lambda: _tcp("127.0.0.1", port)), True
        )
        yield Attempt("abstract unix socket", lambda: _unix("\0" + str(outside["name"])), True)
    yield Attempt("unix socket of a path", lambda: _unix(str(outside["path"])))
    yield Attempt("unix datagram", lambda: _family(socket.AF_UNIX, socket.SOCK_DGRAM))
    yield Attempt("raw socket", lambda: _family(socket.AF_INET, socket.SOCK_RAW, 1))
    yield Attempt("packet socket", lambda: _family(socket.AF_PACKET, socket.SOCK_RAW, 3))
    yield Attempt("vsock", lambda: _family(_AF_VSOCK, socket.SOCK_STREAM))
    yield Attempt("bluetooth, alg, rds, tipc, xdp", _families)
    yield Attempt("io_uring", _ring)
    yield Attempt("inherited socket", lambda: _inherited({own, *listeners}))
    for each in listeners:
        path = str(outside["path"])
        yield Attempt("served socket turned round", partial(_turned_round, each, path))
    yield Attempt("network namespace of another process", lambda: _namespace_of(process))
    yield Attempt("memory of a process outside", lambda: _memory_of(process))
    yield Attempt("typing into the terminal", _type_into_terminal)


def try_all(
    outside: Mapping[str, object],
    loopback: bool = True,
    own: int = -1,
    listeners: Collection[int] = (),
) -> tuple[Way, ...]:
    """Try every way out and return what came of each; arguments as of `attempts`."""
    return tuple(_tried(each) for each in attempts(outside, loopback, own, listeners))


def _tried(attempt: Attempt) -> Way:
    try:
        attempt.take()
    except TimeoutError:
        # Nothing was refused: a packet has left, and nobody answered.
        return Way(attempt.name, True, "no answer, but not refused")
    except OSError as error:
        word = errno.errorcode.get(error.errno or 0, type(error).__name__)
        # A machine that refuses a connection has been reached, and a call under way has begun.
        reached = error.errno == errno.ECONNREFUSED and not attempt.here
        return Way(attempt.name, reached or error.errno in _BEGUN, word)
    return Way(attempt.name, True, "open")
