"""Ways out of a machine, each taken by a child process; run as a program, in a layer or in none.

`python ways.py LAYER FACTS` prints JSON: name of the way to "out" or what stopped it. FACTS is
JSON: addresses of a sink on another machine, and of services beside the jail.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

FACTS: dict[str, Any] = {}
WAYS: dict[str, Callable[[], object]] = {}
SECONDS = 4
PYTHON = sys.executable
CONNECT = (
    "import socket,sys;s=socket.create_connection((sys.argv[1],int(sys.argv[2])),3);"
    "s.send(b'x');assert s.recv(4)"
)


class Missing(Exception):
    """This machine doesn't have the way."""


def way(function: Callable[[], object]) -> Callable[[], object]:
    WAYS[function.__name__.replace("_", " ")] = function
    return function


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def done(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def sockaddr(address: str, port: int) -> bytes:
    return struct.pack("=H", 2) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)


def talk(made: socket.socket) -> None:
    made.settimeout(2)
    made.send(b"GET / HTTP/1.0\r\n\r\n")
    assert made.recv(4)


def child(*command: str, **more: Any) -> None:
    answer = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False, **more)
    if answer.returncode:
        last = answer.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise PermissionError(last)


@way
def python_socket() -> None:
    with socket.create_connection((FACTS["sink"], FACTS["port"]), 2) as made:
        talk(made)


@way
def connect_by_ctypes() -> None:
    made = done(libc().socket(2, 1, 0))
    done(libc().connect(made, sockaddr(FACTS["sink"], FACTS["port"]), 16))


@way
def curl() -> None:
    if not shutil.which("curl"):
        raise Missing("curl")
    child("curl", "-sS", "-m", "3", "--noproxy", "*", f"http://{FACTS['sink']}:{FACTS['port']}/")


@way
def python_without_site() -> None:
    child(PYTHON, "-I", "-S", "-c", CONNECT, FACTS["sink"], str(FACTS["port"]))


@way
def grandchild_of_its_own_session() -> None:
    code = (
        "import os,subprocess,sys;os.setsid();"
        "sys.exit(subprocess.call([sys.executable,*sys.argv[1:]]))"
    )
    child(PYTHON, "-c", code, "-c", CONNECT, FACTS["sink"], str(FACTS["port"]))


@way
def ipv6() -> None:
    if not FACTS["sink6"]:
        raise Missing("IPv6")
    with socket.create_connection((FACTS["sink6"], FACTS["port"]), 2) as made:
        talk(made)


@way
def udp() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.settimeout(2)
        made.sendto(b"x", (FACTS["sink"], FACTS["port"]))
        assert made.recv(4)


@way
def udp_by_sendmsg() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.settimeout(2)
        made.sendmsg([b"x"], [], 0, (FACTS["sink"], FACTS["port"]))
        assert made.recv(4)


@way
def udp_connected() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.connect((FACTS["sink"], FACTS["port"]))
        talk(made)


@way
def fast_open() -> None:
    with socket.socket() as made:
        made.sendto(b"x", 0x20000000, (FACTS["sink"], FACTS["port"]))
        assert made.recv(4)


@way
def fast_open_by_sendmsg() -> None:
    with socket.socket() as made:
        made.sendmsg([b"x"], [], 0x20000000, (FACTS["sink"], FACTS["port"]))
        assert made.recv(4)


@way
def fast_open_by_option() -> None:
    with socket.socket() as made:
        made.settimeout(2)
        made.setsockopt(socket.IPPROTO_TCP, 30, 1)  # TCP_FASTOPEN_CONNECT
        made.connect((FACTS["sink"], FACTS["port"]))
        talk(made)


@way
def multipath_tcp() -> None:
    try:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    except OSError as error:
        if FACTS["layer"] == "outside":
            raise Missing("MPTCP") from error
        raise
    with made:
        made.settimeout(2)
        made.connect((FACTS["sink"], FACTS["port"]))
        talk(made)


@way
def dns_by_hand() -> None:
    question = struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + b"\x04mine\x07example\0\0\x01\0\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.settimeout(2)
        made.sendto(question, (FACTS["sink"], FACTS["dns"]))
        assert made.recv(512)


@way
def dns_by_getaddrinfo() -> None:
    if FACTS["dns"] != 53:
        raise Missing("a name server of the test's own, which needs root")
    code = "import socket;socket.getaddrinfo('secret.example', 80)"
    child(PYTHON, "-c", code)


@way
def dns_by_getent() -> None:
    if FACTS["dns"] != 53:
        raise Missing("a name server of the test's own, which needs root")
    child("getent", "ahostsv4", "secret.example")


@way
def proxy_in_the_environment() -> None:
    # As a library does it that was written before the job was sealed.
    handler = urllib.request.ProxyHandler({"http": FACTS["proxy"]})
    with urllib.request.build_opener(handler).open("http://example.invalid/", timeout=3) as page:
        assert page.read()


@way
def service_on_loopback() -> None:
    with socket.create_connection(("127.0.0.1", FACTS["local"]), 2) as made:
        talk(made)


@way
def service_on_loopback_by_another_name() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.2", FACTS["local"]))
        other.listen()
        with socket.create_connection(("127.0.0.1", FACTS["local"]), 2) as made:
            talk(made)


@way
def service_on_loopback_by_no_address() -> None:
    with socket.create_connection(("0.0.0.0", FACTS["local"]), 2) as made:
        talk(made)


@way
def unix_socket_of_a_path() -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(FACTS["path"])
        talk(made)


@way
def unix_socket_by_a_link() -> None:
    link = FACTS["path"] + f".{os.getpid()}"
    os.symlink(FACTS["path"], link)
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(link)
        talk(made)


@way
def unix_socket_in_place_of_an_own_one() -> None:
    """A path that the jail has bound itself, and then swapped for the one outside."""
    own = FACTS["path"] + f".own{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as mine, socket.socket(socket.AF_UNIX) as made:
        mine.bind(own)
        mine.listen()
        os.unlink(own)
        os.link(FACTS["path"], own)
        made.connect(own)
        talk(made)


@way
def unix_datagram() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.sendto(b"x", FACTS["log"])


@way
def unix_datagram_of_a_pair() -> None:
    one, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    one.sendmsg([b"x"], [], 0, FACTS["log"])


@way
def abstract_unix_socket() -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.connect("\0" + FACTS["name"])
        talk(made)


@way
def inherited_socket() -> None:
    with socket.socket(fileno=os.dup(FACTS["inherited"])) as made:
        talk(made)


@way
def socket_of_another_process() -> None:
    pidfd = os.pidfd_open(FACTS["pid"])
    taken = done(libc().syscall(438, pidfd, FACTS["their"], 0))
    with socket.socket(fileno=taken) as made:
        made.getpeername()


@way
def memory_of_another_process() -> None:
    os.close(os.open(f"/proc/{FACTS['pid']}/mem", os.O_RDWR))


@way
def namespace_of_another_process() -> None:
    opened = os.open(f"/proc/{FACTS['pid']}/ns/net", os.O_RDONLY)
    if not hasattr(os, "setns"):
        done(libc().setns(opened, 0x40000000))
    else:
        os.setns(opened, 0x40000000)


@way
def io_uring() -> None:
    # Its own call for connecting never passes connect(2).
    done(libc().syscall(425, 1, ctypes.create_string_buffer(120)))


@way
def vsock() -> None:
    try:
        socket.socket(40, socket.SOCK_STREAM).close()
    except OSError as error:
        if FACTS["layer"] == "outside":
            raise Missing("vsock") from error
        raise


@way
def packet_socket() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3).close()


@way
def raw_socket() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 253) as made:
        made.sendto(b"secret", (FACTS["sink"], 0))


@way
def program_in_memory() -> None:
    source = shutil.which("curl")
    if source is None:
        raise Missing("curl")
    made = os.memfd_create("program", 0)
    with open(source, "rb") as program:
        os.sendfile(made, program.fileno(), 0, os.fstat(program.fileno()).st_size)
    place = f"http://{FACTS['sink']}:{FACTS['port']}/"
    child(f"/proc/self/fd/{made}", "-sS", "-m", "3", "--noproxy", "*", place, pass_fds=(made,))


@way
def address_swapped_by_a_thread() -> None:
    """The address is changed while the call is judged; a thousand times over."""
    import threading

    good, bad = sockaddr("127.0.0.1", 1), sockaddr(FACTS["sink"], FACTS["port"])
    shared = ctypes.create_string_buffer(good, 16)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            ctypes.memmove(shared, bad, 16)
            ctypes.memmove(shared, good, 16)

    threading.Thread(target=swap, daemon=True).start()
    try:
        for _ in range(1000 if FACTS["layer"] == "outside" else 300):
            made = done(libc().socket(2, 1, 0))
            if libc().connect(made, shared, 16) == 0:
                return
            os.close(made)
    finally:
        stop.set()
    raise PermissionError("never came through")


@way
def listening_for_whoever_comes() -> None:
    """A port on every address of the machine, which those outside may come to."""
    with socket.socket() as made:
        made.bind(("0.0.0.0", 0))
        made.listen()
        made.settimeout(2)
        with open(FACTS["come"] + f"{made.getsockname()[1]}", "w"):
            pass
        made.accept()


@way
def store_of_torch() -> None:
    """C++: connects by itself."""
    from datetime import timedelta

    import torch

    distributed: Any = torch.distributed
    try:
        distributed.TCPStore(
            FACTS["sink"], FACTS["port"], is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=2),
        )  # fmt: skip
    except RuntimeError as error:
        # The sink is no store: what counts is that it was reached.
        text = str(error).lower()
        if any(word in text for word in ("ping failed", "handshake", "reset", "closed")):
            return
        raise PermissionError(text.splitlines()[0]) from None


def take(name: str) -> str:
    """Take one way in a child process, and return "out" or what stopped it."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        import signal

        signal.alarm(2 * SECONDS + (20 if "torch" in name else 0))
        said = "out"
        try:
            WAYS[name]()
        except Missing as error:
            said = f"missing: {error}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(process, 0)
    return said or "no answer"


def main() -> None:
    layer, facts = sys.argv[1], json.loads(sys.argv[2])
    FACTS.update(facts, layer=layer)
    os.environ.update(http_proxy=facts["proxy"], HTTP_PROXY=facts["proxy"])
    if layer != "outside":
        from mst.seal.jail import ladder
        from mst.seal.jail.seal import USER, JailRequest, Scene

        if layer == "user":
            ladder._MODES["namespace"] = (USER,)
        mode = {"user": "namespace"}.get(layer, layer)
        seal = ladder.enter(JailRequest(mode), Scene(), os.environ)
        FACTS["reached"] = seal.layer
    names = [name for name in WAYS if facts["torch"] or "torch" not in name]
    print(json.dumps({"layer": FACTS.get("reached"), "ways": {name: take(name) for name in names}}))


if __name__ == "__main__":
    main()
