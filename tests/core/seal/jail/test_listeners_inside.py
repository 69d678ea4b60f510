"""A server in the jail: it is asked over a socket that it takes along, and can ask nobody."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile

import pytest

from mst.errors import EXIT_LEAK

ENTER = """
import os, socket, sys
from mst.errors import MstError
from mst.seal.jail import ladder
from mst.seal.jail.seal import USER, JailRequest, Scene
layer, number = sys.argv[1], int(sys.argv[2])
if layer == "user":
    layer = "namespace"
    ladder._MODES["namespace"] = (USER,)
try:
    seal = ladder.enter(JailRequest(layer), Scene(listeners=(number,)), os.environ)
except MstError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""
ANSWER = """
listener = socket.socket(fileno=number)
made, _ = listener.accept()
asked = made.recv(100)
for name in ("127.0.0.1", "outside"):
    try:
        made.connect((name, 1) if name[0] == "1" else name)
        sys.exit("an accepted socket was turned round")
    except (OSError, TypeError):
        pass
made.sendall(asked.upper() + seal.layer.encode())
print([each.found for each in seal.ways if each.name == "served socket turned round"], flush=True)
"""


def started(code: str, layer: str, listener: socket.socket) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ENTER + code, layer, str(listener.fileno())],
        pass_fds=(listener.fileno(),), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("layer", ["namespace", "user", "broker", "seccomp"])
def test_a_unix_listener_is_taken_along_and_accepts(layer: str) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="mst-in-") as directory,
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as client,
    ):
        listener.bind(f"{directory}/s")
        listener.listen()
        with started(ANSWER, layer, listener) as running:
            client.settimeout(60)
            client.connect(f"{directory}/s")
            client.sendall(b"asked ")
            answer = client.makefile("rb").read()
            out, errors = running.communicate(timeout=60)

    assert running.returncode == 0, errors
    assert answer.startswith(b"ASKED ")
    # The kernel's answer to a listening socket that would connect, or the broker's.
    assert out.strip() in ("['EINVAL']", "['EACCES']")


def test_a_listener_of_the_network_is_a_leak() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        started("print('begun')", "auto", listener) as running,
    ):
        out, errors = running.communicate(timeout=60)

    assert (running.returncode, out) == (EXIT_LEAK, "")
    assert "served socket turned round (open)" in errors


def test_a_connected_socket_is_a_leak() -> None:
    one, other = socket.socketpair()
    with one, other, started("print('begun')", "auto", one) as running:
        out, errors = running.communicate(timeout=60)

    assert (running.returncode, out) == (EXIT_LEAK, "")
    assert "served socket turned round (open)" in errors


def test_other_sockets_are_closed_as_ever() -> None:
    code = "print(seal.closed_sockets)"
    one, other = socket.socketpair()
    with (
        one,
        other,
        tempfile.TemporaryDirectory(prefix="mst-in-") as directory,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        listener.bind(f"{directory}/s")
        listener.listen()
        done = subprocess.run(
            [sys.executable, "-c", ENTER + code, "auto", str(listener.fileno())],
            pass_fds=(listener.fileno(), one.fileno()), capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    assert done.stdout.strip() == "1", done.stderr
