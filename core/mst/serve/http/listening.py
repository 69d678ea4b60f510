"""Where a server listens: bound before the jail is entered, and kept apart from it by the relay."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mst.errors import UsageError
from mst.loopback import is_loopback
from mst.seal.jail.namespaces import caller_of_sudo, groups_of, home_of
from mst.serve.http.tls import Tls

BACKLOG = 128
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Of a worker that SIGTERM has ended before it could handle it: while a model was loading, say.
TOLD_TO_END = 128 + signal.SIGTERM
# A socket's name has room for 107 bytes (unix(7)).
_LONGEST_PATH = 107
_LONGEST_DIRECTORY = 80
# After the server has ended, for what a slow client still reads.
_RELAY_SECONDS = 10.0

RELAY = Path(__file__).with_name("relay.py")


@dataclass(frozen=True)
class Place:
    """Where callers come in.

    Attributes:
        host: address or name to bind; "" with `path`.
        port: 0 lets the kernel choose.
        path: of a unix socket, instead.

    Raises:
        UsageError: there is no such port.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    path: str | None = None

    def __post_init__(self) -> None:
        """Check the port."""
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"--port must be from 0 to 65535; found {self.port}.")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.path is not None or is_loopback(self.host)

    def url(self, tls: bool) -> str:
        """Return what callers are given as the base of the API."""
        if self.path is not None:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if tls else 'http'}://{host}:{self.port}/v1"


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: what a request may call this server, in lower case.
        any_address: a number may stand in place of a name.
        any_name: no name is looked at: it is a unix socket.
        keys_file: of API keys; None asks for none.
        tls: None for plain HTTP.
    """

    hosts: tuple[str, ...]
    any_address: bool = False
    any_name: bool = False
    keys_file: str | None = None
    tls: Tls | None = None


@dataclass(frozen=True)
class Listening:
    """What a server takes into the jail.

    Attributes:
        place: as bound, with the port that the kernel chose.
        listener: descriptor of the unix socket from which the server accepts.
        control: writing end of the pipe to the relay.
    """

    place: Place
    listener: int
    control: int


def refuse_net(allow_net: bool, who: str) -> None:
    """Refuse --allow-net to what only answers.

    Raises:
        UsageError: it was given.
    """
    if allow_net:
        raise UsageError(
            f"--allow-net is for jobs on several machines. {who} is asked, and asks nobody; leave"
            " it out."
        )


def bind(place: Place) -> socket.socket:
    """Return a listening socket.

    Raises:
        UsageError: the port or path is taken, or can't be had.
    """
    return _bind_port(place) if place.path is None else _bind_path(Path(place.path))


def _bind_port(place: Place) -> socket.socket:
    where = f"{place.host} port {place.port}"
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
    except OSError:
        raise UsageError(
            f"--host {place.host} is no address of this machine. Leave it out to listen on"
            " 127.0.0.1."
        ) from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        # At once, not when the model is loaded: who connects meanwhile waits, and two servers
        # that load at the same time don't both believe that the port is theirs.
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"{where} is in use by another program. Pass another --port, or 0 for a free one."
            ) from None
        raise UsageError(
            f"{where} can't be listened on: {error.strerror}. Pass another --host or --port."
        ) from None
    return made


def _bind_path(path: Path) -> socket.socket:
    if len(os.fsencode(path.absolute())) > _LONGEST_PATH:
        raise UsageError(
            f"--socket {path} is longer than the {_LONGEST_PATH} bytes that the kernel takes."
            " Choose a shorter path."
        )
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            if not _left_behind(path):
                raise UsageError(
                    f"--socket {path} is in use by another program. End that, or choose another"
                    " path."
                )
            path.unlink()
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # From the first moment nobody else may connect.
    before = os.umask(0o177)
    try:
        made.bind(str(path))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"--socket {path} is there already. Remove it, or choose another path."
            ) from None
        raise UsageError(f"--socket {path} can't be made: {error.strerror}.") from None
    finally:
        os.umask(before)
    return made


def _left_behind(path: Path) -> bool:
    """Return whether nobody listens at a socket's path any more: its server was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.settimeout(1.0)
        try:
            made.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # it is another user's, or too many wait there already
            return False
    return False


@contextlib.contextmanager
def listening(
    place: Place, environ: Mapping[str, str], own_user: bool = False
) -> Iterator[Listening]:
    """Bind, start the relay outside the jail, and yield what goes inside; end the relay after.

    Args:
        place: where callers come in.
        environ: of the process.
        own_user: nobody but this user, and root, may come in.

    Raises:
        UsageError: as `bind`.
    """
    user = caller_of_sudo(environ) if os.geteuid() == 0 else None
    if own_user and place.path is None and not os.access("/proc/net/tcp", os.R_OK):
        raise UsageError(
            "this system does not say which user has connected to a port (/proc/net/tcp can't be"
            " read). Pass --socket PATH, --api-keys require, or, to let in all users of this"
            " machine, --api-keys off."
        )
    with bind(place) as outer, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inner:
        long = len(os.fsencode(tempfile.gettempdir())) > _LONGEST_DIRECTORY
        directory = tempfile.mkdtemp(prefix="mst-serve-", dir="/tmp" if long else None)
        path = f"{directory}/server"
        inner.bind(path)
        inner.listen(socket.SOMAXCONN)
        named = [] if place.path is None else [str(Path(place.path).absolute())]
        if user:
            for each in (directory, path, *named):
                os.chown(each, user[0], user[1])
        bound = place
        if place.path is None:
            bound = Place(place.host, outer.getsockname()[1])
        owner = os.getuid() if user is None else user[0]
        users = f"0,{owner}" if own_user else ""
        reading, writing = os.pipe()
        # Without `site`, and by its file: so Python imports nothing that it doesn't name.
        command = [
            sys.executable, "-I", "-S", str(RELAY),
            str(outer.fileno()), str(reading), users, path, *named,
        ]  # fmt: skip
        relay = start_outside(command, (outer.fileno(), reading), environ)
        os.close(reading)
        outer.close()
        try:
            yield Listening(bound, inner.fileno(), writing)
        finally:
            with contextlib.suppress(OSError):
                os.close(writing)
            _ended(relay)


@contextlib.contextmanager
def told_to_end() -> Iterator[None]:
    """Let SIGTERM end this command with code 0 also before a server's own process is there."""

    def end(*_: object) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def start_outside(
    command: list[str], keep: tuple[int, ...], environ: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a process that stays outside the jail, under sudo as the user who called it.

    Args:
        command: a program that minds Ctrl-C itself, once it runs.
        keep: descriptors that it inherits.
        environ: of this process.
    """
    user = caller_of_sudo(environ) if os.geteuid() == 0 else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        if user is None:
            return subprocess.Popen(command, pass_fds=keep, stdin=subprocess.DEVNULL)
        return subprocess.Popen(
            command,
            pass_fds=keep,
            stdin=subprocess.DEVNULL,
            user=user[0],
            group=user[1],
            extra_groups=groups_of(user[1], user[2]),
            env={**environ, "HOME": home_of(user[0]) or "/nonexistent"},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ended(relay: subprocess.Popen[bytes]) -> None:
    try:
        relay.wait(_RELAY_SECONDS)
    except subprocess.TimeoutExpired:
        relay.kill()
        relay.wait()
