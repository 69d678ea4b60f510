"""What is asked of a jail, and what came of it; both are values that are written down."""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass, field
from typing import Any

from mst.errors import UsageError
from mst.seal.jail.sockaddr import Network

MODES = ("auto", "off", "namespace", "broker", "seccomp")
# The layers, strongest first, as they are recorded.
ROOT, USER, GIVEN, BROKER, SECCOMP, OFF = (
    "root-namespace", "user-namespace", "given-namespace", "broker", "seccomp", "off",
)  # fmt: skip
WORDS = {
    ROOT: "network namespace",
    USER: "network namespace",
    GIVEN: "network namespace of the container",
    BROKER: "broker on this machine's network",
    SECCOMP: "no sockets, one process",
    OFF: "off",
}


@dataclass(frozen=True)
class JailRequest:
    """What the user asks of the jail.

    Attributes:
        mode: of `MODES`.
        reason: why it is off; it is recorded.
        allow_net: networks of the job's other machines, such as 10.0.0.0/24.
    """

    mode: str = "auto"
    reason: str | None = None
    allow_net: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """Where a job stands, which decides what its jail has to leave open.

    Attributes:
        shared: other commands work on the job, on this machine or others.
        meeting: (address, port) where they meet; None when nobody else does.
        nnodes: machines.
        outputs: paths that the user named, under which the job may write.
        listeners: descriptors of listening unix sockets that the job takes with it, as a server
            must. Such a socket can be connected to, and can never connect.
        reads_only: the job writes no file, so that it may write none where the kernel limits that.
    """

    shared: bool = False
    meeting: tuple[str, int] | None = None
    nnodes: int = 1
    outputs: tuple[str, ...] = ()
    listeners: tuple[int, ...] = ()
    reads_only: bool = False


@dataclass(frozen=True)
class Way:
    """A way out that was tried from inside.

    Attributes:
        name: what was tried.
        open: it led out.
        found: the kernel's answer.
    """

    name: str
    open: bool
    found: str


@dataclass(frozen=True)
class Seal:
    """The jail that a job ran in.

    Attributes:
        layer: which one holds; "off" for none.
        reason: why it is off.
        refused: stronger layers that this machine did not give, with the reason.
        ways: what was tried from inside before the job began.
        unix: who judges unix sockets: "broker", or "none" when the family is refused.
        files: Landlock's version that limits where is written, or why nothing does.
        user: whom the job runs as.
        closed_sockets: inherited ones that were closed.
        allow_net: networks that are open.
        kernel: release and machine.
        broker: number of the broker's process.
    """

    layer: str
    reason: str | None = None
    refused: tuple[tuple[str, str], ...] = ()
    ways: tuple[Way, ...] = ()
    unix: str = "none"
    files: str = ""
    user: str = ""
    closed_sockets: int = 0
    allow_net: tuple[str, ...] = ()
    kernel: str = ""
    broker: int = 0

    @property
    def leaks(self) -> tuple[Way, ...]:
        """The ways that led out."""
        return tuple(each for each in self.ways if each.open)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return dataclasses.asdict(self)

    def line(self) -> str:
        """Return the one line that is shown."""
        if self.layer == OFF:
            return f"seal    off: {self.reason}"
        tried = f"{len(self.ways)} ways out tried, none open"
        if self.leaks:
            tried = f"OPEN: {', '.join(each.name for each in self.leaks)}"
        allowed = f", open to {', '.join(self.allow_net)}" if self.allow_net else ""
        return f"seal    {WORDS[self.layer]}{allowed}, {tried}"


@dataclass
class _Process:
    """What holds of this process: the kernel never takes a jail off again, so it is set once."""

    seal: Seal | None = field(default=None)


_this_process = _Process()


def current() -> Seal | None:
    """Return the jail that this process has entered, the decision for none, or None."""
    return _this_process.seal


def entered(seal: Seal) -> None:
    """Remember this process's jail."""
    _this_process.seal = seal


def networks(request: JailRequest) -> tuple[Network, ...]:
    """Return what --allow-net names.

    Raises:
        UsageError: it is no network, or all of them.
    """
    found = []
    for text in request.allow_net:
        try:
            network = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise UsageError(
                f"--allow-net takes addresses such as 10.0.0.0/24 or 10.0.0.7, not {text!r}."
            ) from None
        if network.prefixlen == 0:
            raise UsageError(
                f"--allow-net {text} is every address there is. Name the network of the job's"
                " machines, or say --jail off with --jail-reason."
            )
        found.append(network)
    return tuple(found)


def check(request: JailRequest, scene: Scene) -> None:
    """Refuse what does not fit together.

    Raises:
        UsageError: says which options, and what to pass.
    """
    networks(request)
    if request.mode == OFF and not (request.reason or "").strip():
        raise UsageError(
            '--jail off needs --jail-reason "…": it is recorded with the run, for whoever has to'
            " answer for it."
        )
    if request.mode != OFF and request.reason:
        raise UsageError("--jail-reason belongs to --jail off.")
    if request.mode in ("namespace", "seccomp") and (request.allow_net or scene.shared):
        why = "--allow-net" if request.allow_net else "a job of several commands"
        raise UsageError(
            f"--jail {request.mode} leads nowhere, and {why} needs a network. Pass --jail broker."
        )
    if scene.nnodes > 1 and not request.allow_net and request.mode != OFF:
        where = scene.meeting[0] if scene.meeting else "the others"
        raise UsageError(
            f"--nnodes {scene.nnodes}: this job is sealed, and has to reach the other machines."
            f" Pass --allow-net with their network, to which {where} belongs, on each machine."
        )
