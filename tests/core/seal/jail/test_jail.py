"""What the jail leaves a job, what it takes, and what happens where it can't be had."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mst.errors import EXIT_LEAK, EXIT_REFUSED, EXIT_USAGE, UsageError
from mst.seal.jail import advice
from mst.seal.jail.broker import Court, bound_address, may_connect
from mst.seal.jail.job_ports import JobPorts, job_directory
from mst.seal.jail.landlock import nodes
from mst.seal.jail.seal import JailRequest, Scene, check
from mst.seal.jail.sockaddr import Inet, Unix, parse
from mst.seal.jail.ways_out import listen_outside, name_servers, try_all

LAYERS = ("namespace", "user", "broker", "seccomp")
ENTER = """
import json, os, sys
from mst.errors import MstError
from mst.seal.jail import ladder, words
from mst.seal.jail.seal import USER, JailRequest, Scene
layer, allow = sys.argv[1], tuple(sys.argv[2:])
if layer == "user":
    layer = "namespace"
    ladder._MODES["namespace"] = (USER,)
{before}
try:
    seal = ladder.enter(JailRequest(layer, allow_net=allow), Scene(), os.environ)
except MstError as error:
    print(f"{{type(error).__name__}}: {{error}}", file=sys.stderr)
    sys.exit(error.exit_code)
"""
# As Docker's default profile does it, and then more: (system call, errno).
FILTERED = """
from mst.seal.jail import kernel
here = kernel.machine()
program = [(0x20, 0, 0, 0)]
for name in {names!r}:
    program += [(0x15, 0, 1, here.numbers[name]), (6, 0, 0, 0x50001)]
kernel.install_filter([*program, (6, 0, 0, 0x7FFF0000)], listener=False)
"""


def inside(
    code: str, layer: str = "auto", *allow: str, before: str = "", **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python in a jail."""
    return subprocess.run(
        [sys.executable, "-c", ENTER.format(before=before) + code, layer, *allow],
        capture_output=True, text=True, timeout=60, check=False, **more,
    )  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_a_job_keeps_what_it_needs(layer: str, tmp_path: Path) -> None:
    code = """
import multiprocessing, socket, subprocess, threading
one, other = socket.socketpair()
one.send(b"x")
assert other.recv(1) == b"x"
assert subprocess.run(["true"]).returncode == 0
thread = threading.Thread(target=print, args=("a thread",))
thread.start(); thread.join()
if seal.layer != "seccomp":
    server = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(server.getsockname(), 3) as made:
        server.accept()[0].send(b"y")
        assert made.recv(1) == b"y"
    wide = socket.create_server(("", 0))
    socket.create_connection(("127.0.0.1", wide.getsockname()[1]), 3).close()
    six = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    socket.create_connection(("127.0.0.1", six.getsockname()[1]), 3).close()
    quiet = socket.socket()
    quiet.listen()
    socket.create_connection(("127.0.0.1", quiet.getsockname()[1]), 3).close()
    with multiprocessing.get_context("fork").Manager() as manager:
        assert manager.dict(a=1)["a"] == 1
    for name in ("\\0mst-test-of-a-job", "here.sock"):
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as made:
            server.bind(name)
            server.listen()
            made.connect(name)
            server.accept()[0].close()
"""
    done = inside(code, layer, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout == "a thread\n"


def test_writing_is_limited_to_what_was_named(tmp_path: Path) -> None:
    if not Path("/sys/kernel/security").is_dir() or "landlock" not in open_modules():
        pytest.skip("wants a kernel with Landlock")
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    code = f"""
from pathlib import Path
for good in ("of-mine", os.environ["TMPDIR"] + "/mine", "/dev/null", "/dev/shm/mst-test"):
    Path(good).write_text("x")
os.unlink("/dev/shm/mst-test")
for bad in ({str(elsewhere)!r} + "/not-mine", "/etc/mst-test", "/usr/mst-test"):
    try:
        Path(bad).write_text("x")
    except PermissionError:
        continue
    sys.exit(bad)
print(seal.files)
"""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = inside(code, cwd=here, env={**os.environ, "TMPDIR": str(temporary)})

    assert done.returncode == 0, done.stderr
    assert "Landlock" in done.stdout


def test_a_job_that_only_reads_can_write_nowhere(tmp_path: Path) -> None:
    if not Path("/sys/kernel/security").is_dir() or "landlock" not in open_modules():
        pytest.skip("wants a kernel with Landlock")
    (tmp_path / "kept").write_text("x")
    code = """
from pathlib import Path
print(Path("kept").read_text())
for bad in ("here", "kept", os.environ["TMPDIR"] + "/mine", os.environ["HOME"] + "/.cache/mine"):
    try:
        Path(bad).write_text("y")
    except PermissionError:
        continue
    sys.exit(bad)
"""
    before = "from functools import partial; Scene = partial(Scene, reads_only=True)"
    (tmp_path / ".cache").mkdir()
    environ = {**os.environ, "TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    done = inside(code, before=before, cwd=tmp_path, env=environ)

    assert (done.returncode, done.stdout) == (0, "x\n"), done.stderr


@pytest.mark.parametrize("given", [True, False])
def test_a_new_users_cache_can_be_written(tmp_path: Path, given: bool) -> None:
    here, home, named = (tmp_path / each for each in ("here", "home", "named/cache"))
    here.mkdir()
    home.mkdir()
    code = """
from mst.cache import cache_dir
cache_dir().mkdir(parents=True)
(cache_dir() / "kept").write_text("x")
"""
    environ = {**os.environ, "HOME": str(home)} | ({"XDG_CACHE_HOME": str(named)} if given else {})
    if not given:
        environ.pop("XDG_CACHE_HOME", None)
    make = "from mst.seal.jail import landlock; landlock.make_cache(os.environ)"
    done = inside(code, before=make, cwd=here, env=environ)
    cache = named if given else home / ".cache"

    assert done.returncode == 0, done.stderr
    assert (cache / "mst" / "kept").read_text() == "x"
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_temporary_directory_may_have_a_long_name(tmp_path: Path) -> None:
    temporary = tmp_path / ("d" * 100)
    temporary.mkdir()
    done = inside("print('in')", cwd=tmp_path, env={**os.environ, "TMPDIR": str(temporary)})

    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr
    assert list(temporary.iterdir()) == []


def test_nodes_of_disks_and_memory_are_withheld() -> None:
    names = {each.name for each in nodes()}

    assert {"null", "shm"} <= names
    assert names & {"mem", "kvm", "vsock", "net", "infiniband", "vhost-net", "mapper"} == set()
    assert not any(each.is_block_device() for each in nodes())
    assert set(nodes()) <= set(nodes(rdma=True))


def open_modules() -> str:
    try:
        return Path("/sys/kernel/security/lsm").read_text()
    except OSError:
        # Not mounted in a container; the kernel itself can be asked.
        from mst.seal.jail.landlock import abi

        return "landlock" if abi() >= 2 else ""


def test_nothing_of_the_users_session_comes_in(tmp_path: Path) -> None:
    code = """
import resource
names = ("HTTPS_PROXY", "all_proxy", "SSH_AUTH_SOCK", "DOCKER_HOST")
print([name for name in names if name in os.environ], os.environ["HF_HUB_OFFLINE"],
      seal.closed_sockets, resource.getrlimit(resource.RLIMIT_CORE)[1] <= 1)
status = open("/proc/self/status").read()
caps = [line.split()[1] for line in status.splitlines() if line.startswith("Cap")]
assert set(caps) == {"0" * 16}, caps
assert "NoNewPrivs:\\t1" in status
"""
    environment = {
        **os.environ, "HTTPS_PROXY": "http://10.0.0.1", "all_proxy": "x",
        "SSH_AUTH_SOCK": "/tmp/agent", "DOCKER_HOST": "unix:///run/docker.sock",
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    one, other = socket.socketpair()
    with one, other:
        done = inside(code, env=environment, pass_fds=(one.fileno(),))

    assert done.returncode == 0, done.stderr
    assert done.stdout == "[] 1 1 True\n"


def test_no_namespaces_leave_the_broker() -> None:
    done = inside("print(seal.to_json())", before=FILTERED.format(names=("unshare",)))

    assert done.returncode == 0, done.stderr
    seal: dict[str, Any] = eval(done.stdout)
    refused = dict(seal["refused"])
    assert seal["layer"] == "broker"
    assert set(refused) == {"root-namespace", "user-namespace"}


@pytest.mark.parametrize(
    ("asked", "filtered", "layer", "unix"),
    [
        ("auto", ("unshare",), "broker", "broker"),
        ("auto", ("unshare", "pidfd_getfd"), "given-namespace", "none"),
        # Others in the namespace have sockets too, and one of them could be a way out.
        ("namespace", ("unshare",), "given-namespace", "none"),
    ],
)
def test_a_network_that_was_given_is_not_taken_for_the_jobs_own(
    asked: str, filtered: tuple[str, ...], layer: str, unix: str
) -> None:
    given = """
from mst.seal.jail import namespaces
namespaces.enter_as_root() if os.geteuid() == 0 else namespaces.enter_unprivileged()
"""
    code = "print(seal.layer, seal.unix)"
    done = inside(code, asked, before=given + FILTERED.format(names=filtered))

    assert done.stdout.split() == [layer, unix], done.stderr


def test_dockers_default_profile_leaves_one_process() -> None:
    before = FILTERED.format(names=("unshare", "pidfd_getfd"))
    code = """
from mst.seal.jail.command import write
from mst.launch import run_ranks
try:
    run_ranks("mst.training.worker", [[], []], {})
except MstError as error:
    print(seal.layer, error.exit_code, error)
"""
    done = inside(code, before=before)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("seccomp 3 2 processes were planned")


@pytest.mark.parametrize("layer", ["auto", "namespace", "broker", "seccomp"])
def test_without_namespaces_and_seccomp_nothing_is_started(layer: str) -> None:
    before = FILTERED.format(names=("unshare", "seccomp"))
    done = inside("print('started')", layer, before=before)

    assert done.returncode == EXIT_REFUSED
    assert done.stdout == ""
    assert "JailError: this job can't be sealed here" in done.stderr
    assert "user.max_user_namespaces" in done.stderr
    assert "docker run --network none" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_layer_that_was_asked_for_is_not_exchanged() -> None:
    done = inside("print('started')", "namespace", before=FILTERED.format(names=("unshare",)))

    assert (done.returncode, done.stdout) == (EXIT_REFUSED, "")


def test_a_leak_stops_the_job_and_is_named() -> None:
    # A filter that lets everything through stands for a kernel that doesn't keep its promise.
    before = "ladder.instructions = lambda machine, rules: [(6, 0, 0, 0x7FFF0000)]"
    done = inside("print('started')", "seccomp", before=before)

    assert (done.returncode, done.stdout) == (EXIT_LEAK, "")
    assert "service of this machine on loopback (open)" in done.stderr
    assert "unix socket of a path (open)" in done.stderr


def test_several_threads_are_refused() -> None:
    before = (
        "import threading, time;"
        " threading.Thread(target=time.sleep, args=(5,), daemon=True).start()"
    )
    done = inside("print('started')", before=before)

    assert (done.returncode, done.stdout) == (EXIT_REFUSED, "")
    assert "several threads" in done.stderr


def test_a_jail_in_a_jail_holds() -> None:
    again = f"""
import subprocess
print(seal.layer, flush=True)
subprocess.run([sys.executable, "-c", {ENTER.format(before="")!r} + "print(seal.layer)", "auto"])
"""
    done = inside(again, "namespace")

    assert done.stdout.split()[1:] == ["given-namespace"], done.stderr


def test_without_its_broker_the_jail_stays_shut() -> None:
    code = """
import ctypes, errno, signal, socket, time
os.kill(seal.broker, signal.SIGKILL)
time.sleep(0.3)
with socket.socket() as made:
    print(errno.errorcode[made.connect_ex(("127.0.0.1", 9))])
# Nor can the process answer for itself.
from mst.seal.jail import kernel
try:
    kernel.install_filter([(6, 0, 0, 0x7FFF0000)], listener=True)
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    # Landlock would keep the job from ending it.
    done = inside(code, before="ladder.landlock.LEAST_ABI = 99")

    assert done.stdout.split() == ["ENOSYS", "EPERM"], done.stderr


def test_the_broker_ends_with_the_jail() -> None:
    done = inside("print(seal.broker)")
    broker = int(done.stdout)
    deadline = 100
    while deadline and Path(f"/proc/{broker}/cmdline").is_file():
        if not Path(f"/proc/{broker}/cmdline").read_bytes():  # a zombie of a container's init
            break
        deadline -= 1
        subprocess.run(["sleep", "0.05"], check=True)

    assert deadline


def test_a_refusal_says_why_and_what_opens_it() -> None:
    code = """
import socket
os.environ[words.VARIABLE] = words.told(seal)
words.explain(os.environ)
for attempt in (lambda: socket.create_connection(("192.0.2.1", 80)),
                lambda: socket.getaddrinfo("huggingface.co", 443)):
    try:
        attempt()
    except PermissionError as error:
        print(error)
socket.getaddrinfo("localhost", 80)
"""
    done = inside(code, "namespace")
    first, second = done.stdout.splitlines()

    assert first.startswith("mst: connecting to 192.0.2.1 was refused: this job is sealed")
    assert "--allow-net" in first
    assert second.startswith("mst: looking up huggingface.co was refused")


def test_allowed_networks_are_reached_and_come_in(outside: dict[str, Any]) -> None:
    if outside["dns"] != 53:
        pytest.skip("wants root and iproute2")
    code = f"""
import socket
with socket.create_connection(({outside["sink"]!r}, {outside["port"]}), 3) as made:
    made.send(b"x")
    print(made.recv(4))
try:
    socket.create_connection(("192.0.2.200", 80), 3)
except PermissionError:
    print("refused")
server = socket.create_server(("", 0))
print(server.getsockname()[1], flush=True)
server.settimeout(5)
print(server.accept()[1][0])
"""
    done = subprocess.Popen(
        [sys.executable, "-c", ENTER.format(before="") + code, "auto", outside["sink"] + "/32"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.stdout is not None
    lines = [done.stdout.readline().strip() for _ in range(3)]
    assert lines[:2] == ["b'HTTP'", "refused"]
    knock = "import socket,sys;socket.create_connection((sys.argv[1],int(sys.argv[2])),4)"
    # Another address of the machine that is allowed: its packets are dropped.
    subprocess.run(
        ["ip", "-n", f"mst-s{os.getpid()}", "addr", "add", outside["third"] + "/24", "dev",
         f"mj{os.getpid() % 10**6}b"], check=True,
    )  # fmt: skip
    other = (
        "import socket,sys;s=socket.socket();s.settimeout(1);s.bind((sys.argv[3],0));"
        "s.connect((sys.argv[1],int(sys.argv[2])))"
    )
    inside_there = ["ip", "netns", "exec", f"mst-s{os.getpid()}", sys.executable, "-c"]
    refused = subprocess.run(
        [*inside_there, other, outside["own"], lines[2], outside["third"]],
        capture_output=True,
        text=True,
    )
    allowed = subprocess.run(
        [*inside_there, knock, outside["own"], lines[2]], capture_output=True, text=True
    )

    assert "timed out" in refused.stderr
    assert allowed.returncode == 0, allowed.stderr
    assert done.stdout.readline().strip() == outside["sink"]
    assert done.wait(10) == 0
    done.stdout.close()


@pytest.mark.parametrize(
    ("request_", "scene", "words"),
    [
        (JailRequest("off"), Scene(), "--jail-reason"),
        (JailRequest("off", "  "), Scene(), "--jail-reason"),
        (JailRequest("auto", "because"), Scene(), "belongs to --jail off"),
        (JailRequest(allow_net=("10.0.0.0/33",)), Scene(), "'10.0.0.0/33'"),
        (JailRequest(allow_net=("example.org",)), Scene(), "'example.org'"),
        (JailRequest(allow_net=("0.0.0.0/0",)), Scene(), "every address"),
        (JailRequest(allow_net=("::/0",)), Scene(), "every address"),
        (JailRequest("namespace", allow_net=("10.0.0.1",)), Scene(), "--jail broker"),
        (JailRequest(), Scene(True, ("10.0.0.1", 29500), 2), "to which 10.0.0.1 belongs"),
        (JailRequest("seccomp"), Scene(True, ("127.0.0.1", 1), 1), "--jail broker"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    request_: JailRequest, scene: Scene, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check(request_, scene)

    assert words in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        (b"\2\0\0\x50\x7f\0\0\1" + bytes(8), Inet(ipaddress.ip_address("127.0.0.1"), 80)),
        (b"\x0a\0\0\x50" + bytes(4) + bytes(10) + b"\xff\xff\x0a\0\0\1" + bytes(4),
         Inet(ipaddress.ip_address("10.0.0.1"), 80)),
        (b"\1\0/run/x\0rest", Unix(b"/run/x", False)),
        (b"\1\0\0name\0", Unix(b"name\0", True)),
        (b"\1\0", None),
        (b"\2\0\0\x50\x7f", None),
        (b"", None),
        (b"\0\0" + bytes(14), None),
    ],
)  # fmt: skip
def test_addresses_are_read_as_the_kernel_reads_them(raw: bytes, place: object) -> None:
    assert parse(raw) == place


def place(address: str, port: int = 80) -> Inet:
    return Inet(ipaddress.ip_address(address), port)


def test_what_a_broker_lets_through() -> None:
    court = Court(
        host=True,
        networks=(ipaddress.ip_network("10.1.0.0/16"),),
        named=frozenset({("127.0.0.1", 29500)}),
        addresses=frozenset({ipaddress.ip_address("10.1.0.5")}),
    )
    court.ports.add("127.0.0.1", 4000)
    court.ports.add("0.0.0.0", 5000)
    good = [place("10.1.2.3"), place("127.0.0.1", 29500), place("127.0.0.1", 4000),
            place("0.0.0.0", 4000), place("127.0.0.1", 5000), place("10.1.0.5", 5000)]  # fmt: skip
    bad = [place("10.2.0.1"), place("127.0.0.1", 3128), place("127.0.0.2", 4000),
           place("10.1.0.5", 22), place("::1", 4000), place("2001:db8::1"),
           place("169.254.169.254")]  # fmt: skip

    assert [each for each in good if not may_connect(court, each)] == []
    assert [each for each in bad if may_connect(court, each)] == []
    assert str(bound_address(Court(host=True), place("0.0.0.0"))) == "127.0.0.1"
    assert bound_address(Court(host=True), place("10.1.0.5")) is None
    assert str(bound_address(court, place("0.0.0.0"))) == "0.0.0.0"
    assert bound_address(court, place("10.9.9.9")) is None


def test_brokers_of_one_job_know_each_others_ports(tmp_path: Path) -> None:
    directory = job_directory("10.0.0.1 29500", tmp_path)
    other = job_directory("10.0.0.1 29501", tmp_path)
    one, two, far = JobPorts(directory), JobPorts(directory), JobPorts(other)
    one.add("127.0.0.1", 4000)

    assert ("127.0.0.1", 4000) in two
    assert ("127.0.0.1", 4001) not in two
    assert ("127.0.0.1", 4000) not in far
    os.close(one._file)  # its broker has ended
    assert ("127.0.0.1", 4000) not in two
    assert list(directory.iterdir()) == []


def test_a_directory_that_others_can_write_is_no_place_to_meet(tmp_path: Path) -> None:
    job_directory("a job", tmp_path).parent.chmod(0o777)
    with pytest.raises(PermissionError):
        job_directory("a job", tmp_path)


def test_the_self_test_finds_what_is_open() -> None:
    outside = listen_outside()
    try:
        found = {way.name for way in try_all(outside.facts()) if way.open}
    finally:
        outside.close()

    assert {"service of this machine on loopback", "the same from a child",
            "abstract unix socket", "unix socket of a path", "unix datagram"} <= found  # fmt: skip
    assert not Path(outside.directory).exists()


def test_name_servers_are_read_from_any_resolv_conf(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("# x\nnameserver 10.0.0.1\nnameserver\nsearch a\nnameserver fe80::1%eth0\n")

    assert name_servers(file) == ["10.0.0.1", "fe80::1"]
    assert name_servers(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("kernel/unprivileged_userns_clone", "0\n", "kernel.unprivileged_userns_clone=1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1\n", "apparmor_restrict"),
        ("user/max_user_namespaces", "0\n", "user.max_user_namespaces=15000"),
    ],
)
def test_the_switch_that_is_off_is_named(tmp_path: Path, file: str, text: str, words: str) -> None:
    place = tmp_path / "proc/sys" / file
    place.parent.mkdir(parents=True)
    place.write_text(text)

    assert words in advice.reason(PermissionError(1, "no"), tmp_path / "proc")


def test_an_unknown_processor_is_refused_in_words() -> None:
    before = "ladder.kernel.machine = lambda: None"
    done = inside("print('started')", before=before)

    assert (done.returncode, done.stdout) == (EXIT_REFUSED, "")
    assert "x86_64 and aarch64" in advice.what_to_do("riscv64")
