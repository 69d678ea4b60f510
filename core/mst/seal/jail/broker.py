"""The broker: a process outside the jail that does what the jail may do, and refuses the rest.

The kernel holds a judged call until the broker answers. The broker copies the address out of the
caller once, judges the copy and does the call itself, on the caller's socket, with the copy: what
another thread writes over the original in between changes nothing (seccomp_unotify(2)).
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field

from mst.seal.jail import kernel, unix_diag
from mst.seal.jail.filters import AF_NETLINK
from mst.seal.jail.job_ports import JobPorts
from mst.seal.jail.listeners import guard
from mst.seal.jail.sockaddr import Address, Inet, Network, Unix, parse

# After the main process has ended, for kernels that don't say when the last one has (before 5.9).
_LINGER_SECONDS = 60.0
_LOOPBACK = tuple(ipaddress.ip_network(each) for each in ("127.0.0.0/8", "::1/128"))
_REFUSED = errno.EACCES


@dataclass
class Court:
    """What a broker judges by.

    Attributes:
        host: the jail shares the machine's network, so that inet addresses are judged.
        networks: where it may connect, and from where it may be reached.
        named: places on this machine where the ranks were told to meet.
        addresses: of this machine, beside loopback.
        ports: what the job has bound on this machine.
        diag: lists the unix sockets of the jail's namespace; None refuses every path.
        sockets: inodes of unix sockets that the jail has bound; judged by when `host`.
    """

    host: bool
    networks: tuple[Network, ...] = ()
    named: frozenset[tuple[str, int]] = frozenset()
    addresses: frozenset[Address] = frozenset()
    ports: JobPorts = field(default_factory=JobPorts)
    diag: socket.socket | None = None
    sockets: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Call:
    """A system call that waits for its answer."""

    identity: int
    task: int
    number: int
    arguments: tuple[int, ...]


def may_connect(court: Court, place: Inet) -> bool:
    """Return whether a jail that shares the machine's network may connect there."""
    address = place.address
    if address.is_unspecified:  # the kernel takes it for loopback
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    if not (address.is_loopback or address in court.addresses):
        return any(address in each for each in court.networks)
    anywhere = "0.0.0.0" if address.version == 4 else "::"
    # Two addresses of loopback can have two owners of one port: the exact one counts.
    return (str(address), place.port) in court.named or any(
        (each, place.port) in court.ports for each in (str(address), anywhere)
    )


def bound_address(court: Court, place: Inet) -> Address | None:
    """Return the address to bind instead of the one that was asked for, or None to refuse."""
    address = place.address
    if address.is_loopback:
        return address
    if address.is_unspecified:
        if court.networks:
            return address
        return ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return address if court.networks and address in court.addresses else None


def serve(
    listener: int, process: int, court: Court, once: tuple[int, Callable[[], None]] | None = None
) -> None:
    """Answer calls until no process of the jail is left.

    Args:
        listener: from `mst.seal.jail.kernel.install_filter`.
        process: pidfd of the jail's first process.
        court: what is judged by.
        once: a descriptor, and what to do when something is to be read from it.
    """
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(process, select.POLLIN)
    if once:
        poll.register(once[0], select.POLLIN)
    ended: float | None = None
    while ended is None or time.monotonic() - ended < _LINGER_SECONDS:
        for number, events in poll.poll(None if ended is None else 1000):
            if once and number == once[0]:
                poll.unregister(number)
                once[1]()
            elif number == process:
                poll.unregister(process)
                ended = time.monotonic()
            elif events & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                return
            elif events & select.POLLIN:
                call = _receive(listener)
                if call is not None:
                    _handle(listener, call, court)


def _receive(listener: int) -> Call | None:
    buffer = ctypes.create_string_buffer(80)
    if kernel.libc().ioctl(listener, ctypes.c_ulong(kernel.RECEIVE), buffer) < 0:
        return None  # the caller was killed in between
    identity, task, _, number, _, _, *arguments = struct.unpack("=QIIiIQ6Q", buffer.raw)
    return Call(identity, task, number, tuple(arguments))


def _answer(listener: int, call: Call, number: int) -> None:
    answer = ctypes.create_string_buffer(struct.pack("=QqiI", call.identity, 0, -number, 0))
    kernel.libc().ioctl(listener, ctypes.c_ulong(kernel.SEND), answer)


def _handle(listener: int, call: Call, court: Court) -> None:
    """Answer a call; one that may block is done by a thread, so that others don't wait."""
    try:
        raw, taken = _evidence(listener, call)
    except (OSError, ValueError):
        _answer(listener, call, _REFUSED)
        return

    def finish() -> None:
        number = _REFUSED
        try:
            with closing(taken):
                number = _judge(call, raw, taken, court)
        except OSError as error:
            number = error.errno or _REFUSED
        except Exception:
            number = _REFUSED
        finally:
            _answer(listener, call, number)

    if taken.getblocking():
        threading.Thread(target=finish, daemon=True).start()
    else:
        finish()


def _evidence(listener: int, call: Call) -> tuple[bytes, socket.socket]:
    """Return the address that a caller gave, and its socket."""
    task = kernel.process_fd(call.task, _process_of(call.task))
    try:
        here = kernel.machine()
        raw = b""
        if here is None or call.number != here.numbers["listen"]:
            length = min(call.arguments[2] & 0xFFFFFFFF, 128)
            with open(f"/proc/{call.task}/mem", "rb", buffering=0) as memory:
                raw = os.pread(memory.fileno(), length, call.arguments[1])
        # Still waiting, so its number is not another's by now.
        identity = ctypes.c_uint64(call.identity)
        kernel.checked(
            kernel.libc().ioctl(listener, ctypes.c_ulong(kernel.IS_VALID), ctypes.byref(identity)),
            "valid",
        )
        taken = kernel.system("pidfd_getfd", task, call.arguments[0] & 0x7FFFFFFF, 0)
    finally:
        os.close(task)
    try:
        made = socket.socket(fileno=taken)
    except OSError:  # it is no socket
        os.close(taken)
        raise
    # Python's own idea of it; the flags of the descriptor, which the caller shares, stay.
    made.setblocking(os.get_blocking(taken))
    return raw, made


def _process_of(task: int) -> int:
    with open(f"/proc/{task}/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Tgid:"))


def _judge(call: Call, raw: bytes, taken: socket.socket, court: Court) -> int:
    """Do a call when it may be done; return its errno, 0 for none."""
    here = kernel.machine()
    assert here is not None
    if call.number == here.numbers["listen"]:
        return _listen(call, taken, court)
    if taken.family == AF_NETLINK:
        name = "bind" if call.number == here.numbers["bind"] else "connect"
        return _call(name, taken, raw)
    place = parse(raw)
    if call.number == here.numbers["bind"]:
        return _bind(call, raw, place, taken, court)
    if isinstance(place, Unix):
        return _connect_unix(call, raw, place, taken, court)
    if court.host and (place is None or not may_connect(court, place)):
        return _REFUSED
    return _call("connect", taken, raw)


def _call(name: str, taken: socket.socket, raw: bytes) -> int:
    function = getattr(kernel.libc(), name)
    result = function(taken.fileno(), raw, ctypes.c_uint(len(raw)))
    return ctypes.get_errno() if result < 0 else 0


def _connect_unix(call: Call, raw: bytes, place: Unix, taken: socket.socket, court: Court) -> int:
    """Connect to a unix socket that a process of the jail has bound, and to no other."""
    if place.abstract and not court.host:
        return _call("connect", taken, raw)  # the namespace has names of its own
    if court.diag is None:
        return _REFUSED
    opened = -1
    try:
        if not place.abstract:
            opened = os.open(_as_seen(call, place.name), os.O_PATH | os.O_CLOEXEC)
        file = None if place.abstract else unix_diag.file_of(opened)
        with court.lock:
            found = any(
                each.socket in court.sockets or not court.host
                for each in unix_diag.bound(court.diag)
                if (each.name == b"\0" + place.name if file is None else each.file == file)
            )
        if not found:
            return _REFUSED
        if file is None:
            return _call("connect", taken, raw)
        # By the inode that was judged: what the path means may change.
        return _call("connect", taken, struct.pack("=H", 1) + b"/proc/self/fd/%d\0" % opened)
    finally:
        if opened >= 0:
            os.close(opened)


def _as_seen(call: Call, path: bytes) -> bytes:
    """Return a caller's path as this process has to write it."""
    if not path.startswith(b"/"):
        return b"/proc/%d/cwd/%b" % (call.task, path)
    for own in (b"/proc/self/", b"/proc/thread-self/"):
        if path.startswith(own):
            return b"/proc/%d/%b" % (call.task, path[len(own) :])
    return path


def _bind(
    call: Call, raw: bytes, place: Inet | Unix | None, taken: socket.socket, court: Court
) -> int:
    if isinstance(place, Inet):
        return _bind_inet(raw, place, taken, court)
    if taken.family != socket.AF_UNIX:
        return _REFUSED
    if isinstance(place, Unix) and not place.abstract:
        parent, _, name = _as_seen(call, place.name).rpartition(b"/")
        directory = os.open(parent or b"/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not place.name.startswith(b"/"):
                raw = struct.pack("=H", 1) + b"/proc/self/fd/%d/%b\0" % (directory, name)
            number = _call("bind", taken, raw)
        finally:
            os.close(directory)
    else:
        number = _call("bind", taken, raw)
    if number == 0:
        court.sockets.add(os.fstat(taken.fileno()).st_ino)
    return number


def _bind_inet(raw: bytes, place: Inet, taken: socket.socket, court: Court) -> int:
    address = bound_address(court, place)
    if address is None:
        return errno.EADDRNOTAVAIL
    if not address.is_loopback and not _guarded(taken, court) and address.is_unspecified:
        # Without the filter at least no card is open but the one that leads to the others.
        address = _towards_others(court, address.version)
    if address != place.address:
        raw = _rewritten(raw, taken, address)
    number = _call("bind", taken, raw)
    if number == 0:
        _record(taken, court)
    return number


def _guarded(taken: socket.socket, court: Court) -> bool:
    """Let in nobody but the job's machines and this one; return whether the kernel does it.

    Some kernels want a capability for it, which a broker without root does not have.
    """
    own = [ipaddress.ip_network(each) for each in court.addresses]
    try:
        guard(taken, (*court.networks, *_LOOPBACK, *own))
    except OSError:
        return False
    return True


def _towards_others(court: Court, version: int) -> Address:
    """Return this machine's address in the networks of the job, or loopback."""
    for each in sorted(court.addresses, key=str):
        if each.version == version and any(each in one for one in court.networks):
            return each
    return ipaddress.ip_address("127.0.0.1" if version == 4 else "::1")


def _rewritten(raw: bytes, taken: socket.socket, address: Address) -> bytes:
    """Return a struct sockaddr with another address in place of "any"."""
    if taken.family == socket.AF_INET:
        return raw[:4] + address.packed + raw[8:]
    if address.is_loopback and not taken.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        # A socket for both is met at 127.0.0.1, which is where ranks look for each other.
        address = ipaddress.ip_address("::ffff:127.0.0.1")
    return raw[:8] + address.packed + raw[24:]


def _record(taken: socket.socket, court: Court) -> None:
    name = taken.getsockname()
    address = ipaddress.ip_address(name[0].partition("%")[0])
    plain = getattr(address, "ipv4_mapped", None) or address
    court.ports.add(str(plain), name[1])
    if str(plain) == "::" and not taken.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        court.ports.add("0.0.0.0", name[1])


def _listen(call: Call, taken: socket.socket, court: Court) -> int:
    """Listen, after binding to loopback what would else be bound to every address."""
    if taken.family in (socket.AF_INET, socket.AF_INET6) and taken.getsockname()[1] == 0:
        loopback = "127.0.0.1" if taken.family == socket.AF_INET else "::1"
        with suppress(OSError):
            taken.bind((loopback, 0))
        if not ipaddress.ip_address(taken.getsockname()[0]).is_loopback:
            return _REFUSED
        _record(taken, court)
    backlog = ctypes.c_int(call.arguments[1] & 0x7FFFFFFF)
    result = kernel.libc().listen(taken.fileno(), backlog)
    return ctypes.get_errno() if result < 0 else 0
