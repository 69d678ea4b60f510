"""The broker's process: how it is started, what it is told, and what it tells back."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mst.errors import JailError
from mst.seal.jail import kernel
from mst.seal.jail.broker import Court, serve
from mst.seal.jail.job_ports import JobPorts, job_directory
from mst.seal.jail.namespaces import become
from mst.seal.jail.seal import JailRequest, Scene, networks
from mst.seal.jail.sockaddr import Address
from mst.seal.jail.ways_out import listen_outside

_PR_SET_KEEPCAPS = 8


@dataclass
class Broker:
    """The broker's process, as the jail's first process sees it while both get ready.

    Attributes:
        talk: to it; closed before the job begins.
        process: its number.
        outside: listeners that the self-test tries to reach.
    """

    talk: socket.socket
    process: int
    outside: Mapping[str, object]

    def ask(self, message: Mapping[str, object], descriptors: Iterable[int] = ()) -> dict[str, Any]:
        """Tell it something and return its answer.

        Raises:
            JailError: it is gone.
        """
        try:
            _send(self.talk, message, descriptors)
            return _receive(self.talk)[0]
        except (OSError, ValueError):
            raise JailError("the jail's broker has ended before the job began.") from None


def start(request: JailRequest, scene: Scene, user: tuple[int, int, str] | None) -> Broker:
    """Start the broker outside the jail that this process is about to enter.

    Args:
        request: what the user asked.
        scene: where the job stands.
        user: number, group and name of the user to become; None to stay.
    """
    ours, theirs = socket.socketpair()
    first = os.fork()
    if first == 0:
        # Twice, so that the job has no child that it doesn't know.
        if os.fork():
            os._exit(0)
        code = 1
        with contextlib.suppress(BaseException):
            ours.close()
            _run(theirs, request, scene, user)
            code = 0
        os._exit(code)
    theirs.close()
    os.waitpid(first, 0)
    try:
        hello = _receive(ours)[0]
    except (OSError, ValueError):
        raise JailError("the jail's broker could not be started.") from None
    return Broker(ours, int(hello["process"]), hello)


def _send(
    talk: socket.socket, message: Mapping[str, object], descriptors: Iterable[int] = ()
) -> None:
    socket.send_fds(talk, [json.dumps(message).encode() + b"\n"], list(descriptors))


def _receive(talk: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, descriptors, _, _ = socket.recv_fds(talk, 1 << 16, 4)
    return json.loads(data), list(descriptors)


def _run(
    talk: socket.socket, request: JailRequest, scene: Scene, user: tuple[int, int, str] | None
) -> None:
    """Get ready, then judge until the jail is empty."""
    os.setsid()  # no Ctrl-C: the jail's processes may go on for a while, to save
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _leave_files(talk.fileno())
    if user:
        kernel.prctl(_PR_SET_KEEPCAPS, 1)
        become(*user)
    # What a jailed process of the same user could look into, it could also write into.
    keep = [kernel.CAP_SYS_PTRACE]
    if request.allow_net:
        keep.append(kernel.CAP_NET_ADMIN)  # filters on ports that others come in to
    kernel.drop_capabilities(keep)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    outside = listen_outside()
    _send(talk, outside.facts())
    try:
        # Each question is asked once or never; the last one brings the listener.
        while True:
            message, descriptors = _receive(talk)
            if message["ask"] == "judge":
                break
            _send(talk, _look(message, descriptors))
        court = _court(message, descriptors, request, scene)
        _send(talk, {"ready": True})
        process = kernel.system("pidfd_open", message["process"], 0)
        talk.setblocking(False)
        serve(descriptors[0], process, court, _until_tested(talk, outside))
    finally:
        outside.close()


def _until_tested(talk: socket.socket, outside: Any) -> tuple[int, Any]:
    def done() -> None:
        outside.close()
        talk.close()

    return talk.fileno(), done


def _leave_files(keep: int) -> None:
    """Let go of what the command has open: a pipe must end when the command does."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    top = os.sysconf("SC_OPEN_MAX")
    os.closerange(3, keep)
    os.closerange(keep + 1, top if top > 0 else 1 << 16)
    os.chdir("/")


def _look(message: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
    """Say whether this process may look into the one that asks, as judging its calls needs."""
    for each in descriptors:
        os.close(each)
    task = int(message["process"])
    try:
        pidfd = kernel.process_fd(task, task)
        try:
            os.close(kernel.system("pidfd_getfd", pidfd, int(message["descriptor"]), 0))
        finally:
            os.close(pidfd)
        with open(f"/proc/{task}/mem", "rb", buffering=0):
            pass
    except OSError as error:
        return {"fault": f"{error.strerror or error}"}
    return {"fault": ""}


def own_addresses() -> frozenset[Address]:
    """Return this machine's addresses, but for loopback."""
    import psutil

    found = set()
    for each in psutil.net_if_addrs().values():
        for one in each:
            with contextlib.suppress(ValueError):
                found.add(ipaddress.ip_address(one.address.partition("%")[0]))
    return frozenset(each for each in found if not each.is_loopback)


def _court(
    message: Mapping[str, Any], descriptors: list[int], request: JailRequest, scene: Scene
) -> Court:
    host = bool(message["host"])
    diag = socket.socket(fileno=descriptors[1]) if len(descriptors) > 1 else None
    if not host:
        return Court(host=False, diag=diag)
    directory = None
    named: frozenset[tuple[str, int]] = frozenset()
    if scene.meeting:
        address, port = scene.meeting
        named = frozenset({(address, port)})
        with contextlib.suppress(OSError):  # then only what this jail has bound is met
            directory = job_directory(f"{address} {port}")
    return Court(
        host=True,
        networks=networks(request),
        named=named,
        addresses=own_addresses(),
        ports=JobPorts(directory),
        diag=diag,
    )
