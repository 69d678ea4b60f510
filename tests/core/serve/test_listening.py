"""The relay across the jail's wall, and TLS that ends inside."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mst.chat_remote import ServerError, model_names, server_of
from mst.errors import UsageError
from mst.serve.http.listening import RELAY, Listening, Place, listening
from mst.serve.http.relay import READY, STOP, user_of
from mst.serve.http.tls import Tls, check


@contextlib.contextmanager
def answering(place: Place, own_user: bool = False) -> Iterator[Listening]:
    """Listen, and answer each connection with what it has said, in capitals."""
    with (
        listening(place, {}, own_user) as found,
        socket.socket(fileno=os.dup(found.listener)) as inside,
    ):

        def answer(made: socket.socket) -> None:
            with made, contextlib.suppress(OSError):
                while block := made.recv(1 << 16):
                    made.sendall(block.upper())

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    made = inside.accept()[0]
                    threading.Thread(target=answer, args=(made,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield found
        with contextlib.suppress(OSError):
            inside.shutdown(socket.SHUT_RDWR)


def said(made: socket.socket, text: bytes) -> bytes:
    with made:
        made.settimeout(20)
        made.sendall(text)
        made.shutdown(socket.SHUT_WR)
        return made.makefile("rb").read()


def test_bytes_are_carried_both_ways_once_the_server_is_ready() -> None:
    with answering(Place(port=0)) as found:
        where = ("127.0.0.1", found.place.port)
        with socket.create_connection(where) as early:
            early.settimeout(0.2)
            early.sendall(b"wait")
            with pytest.raises(TimeoutError):
                early.recv(10)
            os.write(found.control, READY)
            early.settimeout(20)
            assert early.recv(10) == b"WAIT"
        large = os.urandom(3 << 20)
        assert said(socket.create_connection(where), large) == large.upper()
        assert said(socket.create_connection(where), b"") == b""


def test_after_the_word_to_stop_what_is_connected_goes_on() -> None:
    with answering(Place(port=0)) as found:
        where = ("127.0.0.1", found.place.port)
        os.write(found.control, READY)
        with socket.create_connection(where) as made:
            made.settimeout(20)
            made.sendall(b"a")
            assert made.recv(1) == b"A"
            os.write(found.control, STOP)
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(where).close()
                except ConnectionRefusedError:
                    break
                assert time.monotonic() < deadline
                time.sleep(0.02)
            made.sendall(b"b")
            assert made.recv(1) == b"B"


def test_a_socket_is_the_users_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    path = Path(f"/tmp/mst-listening-{os.getpid()}.sock")
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()  # as a server that was killed leaves it
    with answering(Place(path=str(path))) as found:
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(fileno=os.dup(found.listener)) as inside:
            inner = Path(inside.getsockname()).parent
        assert inner.stat().st_mode & 0o777 == 0o700
        os.write(found.control, READY)
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(path))
        assert said(made, b"abc") == b"ABC"

    assert not path.exists()
    assert not inner.exists()


def test_a_server_that_ends_leaves_the_path_to_the_one_that_follows() -> None:
    place = Place(path=f"/tmp/mst-following-{os.getpid()}.sock")
    path = Path(place.path or "")
    with contextlib.ExitStack() as last, contextlib.ExitStack() as first:
        before = first.enter_context(answering(place))
        os.write(before.control, READY)
        with pytest.raises(UsageError, match="in use by another program"):
            last.enter_context(answering(place))
        os.write(before.control, STOP)  # answers under way may take a while yet
        deadline = time.monotonic() + 60
        while path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        found = last.enter_context(answering(place))
        os.write(found.control, READY)
        first.close()
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(path))
        assert said(made, b"abc") == b"ABC"

    assert not path.exists()


def test_a_socket_where_many_wait_is_not_taken_for_one_left_behind() -> None:
    path = Path(f"/tmp/mst-waiting-{os.getpid()}.sock")
    with contextlib.ExitStack() as held:
        full = held.enter_context(socket.socket(socket.AF_UNIX))
        full.bind(str(path))
        held.callback(path.unlink)
        full.listen(0)
        for _ in range(2):  # of which the second finds no room
            caller = held.enter_context(socket.socket(socket.AF_UNIX))
            caller.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                caller.connect(str(path))
        with pytest.raises(UsageError, match="in use by another program"):
            held.enter_context(answering(Place(path=str(path))))


def certificate(directory: Path) -> tuple[Path, Path]:
    """Write a certificate of 127.0.0.1 that is its own authority, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    files = directory / "c.pem", directory / "k.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


# The application without a model: what is tried here comes before any is asked.
SERVER = """
import socket, sys
from types import SimpleNamespace
from mst.errors import MstError
from mst.serve.http.access import Keys, Names
from mst.serve.http.app import App
from mst.serve.http.limits import Limits
from mst.serve.http.server import serve
from mst.serve.http.service import Service
from mst.serve.http.tls import Tls
listener, control, *files = sys.argv[1:]
service = Service("x", SimpleNamespace(adapters=(), context=8), None, 8)
app = App(service, Names(), Keys(None), Limits())
made = socket.socket(fileno=int(listener))
try:
    serve(app, made, Limits(header_seconds=2), Tls(*files), int(control))
except MstError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def serving(found: Listening, *files: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVER, str(found.listener), str(found.control), *map(str, files)],
        pass_fds=(found.listener, found.control), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_tls_ends_inside_and_may_ask_for_the_clients_certificate(tmp_path: Path) -> None:
    files = certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=str(files[0]))
    stranger = ssl.create_default_context(cafile=str(files[0]))
    trusting.load_cert_chain(*files)

    def health(context: ssl.SSLContext, port: int) -> bytes:
        raw = socket.create_connection(("127.0.0.1", port))
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as made:
            made.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return made.recv(1000)

    with listening(Place(port=0), {}) as found, serving(found, *files, files[0]) as process:
        where = ("127.0.0.1", found.place.port)
        silent = socket.create_connection(where)
        try:
            assert health(trusting, found.place.port).startswith(b"HTTP/1.1 200")
            answer = b""
            # The client of TLS 1.3 learns of it only when it reads.
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                answer = health(stranger, found.place.port)
            assert answer == b""
            with socket.create_connection(where) as plain:
                plain.settimeout(10)
                plain.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                assert b"200" not in plain.recv(1000)
            with silent:  # who never begins to speak TLS is as late as who sends no head
                silent.settimeout(20)
                assert silent.recv(1000) == b""
        finally:
            process.terminate()
        assert process.wait(60) == 0


def test_mst_chat_believes_its_authority_and_a_lost_relay_ends_the_server(tmp_path: Path) -> None:
    files = certificate(tmp_path)
    with listening(Place(port=0), {}) as found, serving(found, *files) as process:
        where = f"https://127.0.0.1:{found.place.port}"
        try:
            names = model_names(server_of(where, str(files[0])), None)
            with pytest.raises(ServerError, match=r"is not believed.*--server-ca"):
                model_names(server_of(where), None)
            with pytest.raises(UsageError, match="--server-ca"):
                model_names(server_of(where, str(files[1])), None)
            with pytest.raises(ServerError, match="no server answers"):
                model_names(server_of(where.replace("https", "http")), None)
            below = psutil.Process().children()
            next(each for each in below if str(RELAY) in each.cmdline()).kill()
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()

    assert names == ["x"]
    assert process.returncode == 1
    assert "the relay, by which callers come in, has ended" in errors


def test_places_of_servers_are_read_as_they_are_printed() -> None:
    found = server_of("http://[::1]:8000/v1")

    assert (found.host, found.port, found.base, found.tls) == ("::1", 8000, "/v1", False)
    assert server_of("https://wards.example").port == 443
    assert (
        server_of("unix:/run/mst.sock").path == server_of("/run/mst.sock").path == "/run/mst.sock"
    )
    for wrong in ("http://wards.example", "http://10.0.0.7:8000/v1"):
        with pytest.raises(UsageError, match="for all to read"):
            server_of(wrong)
    for wrong in ("http://", "ftp://localhost", "http://localhost:x"):
        with pytest.raises(UsageError, match="--server takes"):
            server_of(wrong)


@pytest.mark.parametrize("caller", ["nurse:5551234@", ":5551234@", "5551234@"])
def test_a_password_in_an_address_is_refused_and_not_quoted(caller: str) -> None:
    with pytest.raises(UsageError, match="--server takes") as caught:
        server_of(f"https://{caller}localhost")

    assert "5551234" not in str(caught.value)


def test_files_that_are_no_tls_are_said(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    files = certificate(tmp_path)
    other = certificate(tmp_path.parent)[1]
    locked = tmp_path / "locked.pem"
    key = serialization.load_pem_private_key(files[1].read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"1234")
    locked.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    check(Tls(str(files[0]), str(files[1]), client_ca=str(files[0])))
    for wrong, words in (
        ((files[0], other), "no certificate and its key"),
        ((files[0], tmp_path / "none"), "none is not there"),
        ((files[0], locked), "locked.pem has a passphrase"),
        ((*files, files[1]), "no certificate and its key"),
        ((*files, tmp_path / "none"), "none is not there"),
    ):
        with pytest.raises(UsageError, match=words):
            check(Tls(*map(str, wrong)))


CONNECT = """
import socket, sys
made = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 20)
made.sendall(b"abc")
made.shutdown(socket.SHUT_WR)
sys.stdout.write(made.makefile("rb").read().decode())
"""


def test_another_user_of_the_machine_is_told_apart() -> None:
    def connected(port: int, user: int | None = None) -> str:
        command = ["/usr/bin/env", "python3", "-c", CONNECT, str(port)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, user=user
        ).stdout

    with answering(Place(port=0), own_user=True) as found:
        os.write(found.control, READY)
        own = connected(found.place.port)
        other = connected(found.place.port, user=65534) if os.geteuid() == 0 else ""

    assert own == "ABC"
    if os.geteuid() != 0:
        pytest.skip("wants root, to be another user")
    assert other.startswith("HTTP/1.1 403")
    assert "other_user" in other


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_kernel_says_who_has_connected(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as listener,
        socket.create_connection(listener.getsockname()[:2]),
        listener.accept()[0] as made,
    ):
        assert user_of(made) == os.getuid()
    one, other = socket.socketpair()
    with one, other:
        assert user_of(one) == os.getuid()
