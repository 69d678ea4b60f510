"""Into the jail: the strongest layer that this machine gives, tested before anything else runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mst.errors import JailError, LeakError
from mst.seal.jail import advice, broker_process, hygiene, kernel, landlock, namespaces, unix_diag
from mst.seal.jail.broker_process import Broker
from mst.seal.jail.filters import ALLOW, RET, Rules, instructions
from mst.seal.jail.seal import (
    BROKER,
    GIVEN,
    OFF,
    ROOT,
    SECCOMP,
    USER,
    JailRequest,
    Scene,
    Seal,
    check,
    current,
    entered,
)
from mst.seal.jail.ways_out import try_all
from mst.seal.memory import core_dumps_off

# A namespace that was given may hold others than the job, and nothing there is judged without the
# broker; with it, what holds is the namespace and the broker.
_MODES = {
    "auto": (ROOT, USER, BROKER, GIVEN, SECCOMP),
    "namespace": (ROOT, USER, GIVEN),
    "broker": (BROKER,),
    "seccomp": (SECCOMP,),
}


def enter(request: JailRequest, scene: Scene, environ: MutableMapping[str, str]) -> Seal:
    """Enter the jail with this process, for good, and return what it is.

    Args:
        request: what the user asked.
        scene: where the job stands.
        environ: the process's environment; proxies and agents are taken out of it.

    Raises:
        UsageError: what was asked does not fit together.
        JailError: no layer can be had; says why, and what to do.
        LeakError: something inside could get out.
    """
    check(request, scene)
    already = current()
    if already is not None:
        return already
    system = os.uname()
    words = f"{system.sysname} {system.release} {system.machine}"
    if request.mode == OFF:
        seal = Seal(OFF, reason=request.reason, kernel=words)
        entered(seal)
        return seal
    if kernel.machine() is None or system.sysname != "Linux":
        raise JailError(f"this job can't be sealed. {advice.what_to_do(system.machine)}")
    if len(os.listdir("/proc/self/task")) > 1:
        raise JailError(
            "this process has several threads, and only one that has a single thread can be sealed."
            " Something that Python loads at its start makes them: a sitecustomize, or a profiler."
        )
    closed = hygiene.close_sockets(keep=scene.listeners)
    core_dumps_off()
    seal = _climb(request, scene, environ)
    seal = replace(seal, closed_sockets=closed, kernel=words, allow_net=request.allow_net)
    entered(seal)
    if seal.leaks:
        raise LeakError(
            f"this job was sealed ({seal.layer}), but the test from inside got out by:"
            f" {', '.join(f'{each.name} ({each.found})' for each in seal.leaks)}. Nothing was"
            " started. Report it with what `mst doctor --seal --json` prints."
        )
    return seal


def _climb(request: JailRequest, scene: Scene, environ: MutableMapping[str, str]) -> Seal:
    sudo = namespaces.caller_of_sudo(environ) if os.geteuid() == 0 else None
    broker = broker_process.start(request, scene, sudo)
    refused: list[tuple[str, str]] = []
    shared = scene.shared or bool(request.allow_net)
    layers = (BROKER,) if shared and request.mode == "auto" else _MODES[request.mode]
    listening = _tried(_listener)
    for layer in layers:
        # A user namespace of root's would hold root alone, who is to be given up.
        fault = "not under sudo" if layer == USER and sudo else _move(layer, listening)
        if fault:
            refused.append((layer, fault))
            continue
        diag = _diag()
        try:
            user, files = _settle(request, scene, environ, sudo)
        except OSError as error:
            raise JailError(f"root could not be given up: {advice.reason(error)}.") from None
        fault = listening or _looks(broker)
        if layer == BROKER and fault:
            refused.append((layer, f"no broker: {fault}"))
            left = _unbrokered(layers, refused)
            if left is None:
                break
            layer = left
        elif layer == GIVEN and not fault:
            # It takes all that is bound in a namespace for the job's own.
            fault = "others may be in this network"
        rules = _rules(layer, brokered=not fault)
        if fault and layer != SECCOMP:
            refused.append(("unix sockets", f"no broker: {fault}"))
        _fall_shut(layer, rules, broker, diag)
        # In a namespace that was given, loopback outside is loopback inside.
        ways = try_all(
            broker.outside, layer != GIVEN, broker.talk.fileno(), listeners=scene.listeners
        )
        broker.talk.close()
        hygiene.clean_environment(environ)
        return Seal(
            layer,
            refused=tuple(refused),
            ways=ways,
            unix=rules.unix,
            files=files,
            user=user,
            broker=broker.process,
        )
    broker.talk.close()
    machine = os.uname().machine
    tried = "; ".join(f"{layer}: {fault}" for layer, fault in refused)
    alone = ""
    if shared:
        alone = " A job of several commands or machines needs the broker."
    raise JailError(f"this job can't be sealed here ({tried}).{alone} {advice.what_to_do(machine)}")


def _unbrokered(layers: Sequence[str], refused: list[tuple[str, str]]) -> str | None:
    """Return the first layer after the broker's that can be had, or None; add to `refused`."""
    # What was given up for the broker stays given up; these layers need none of it.
    for layer in layers[layers.index(BROKER) + 1 :]:
        fault = _move(layer, "")
        if not fault:
            return layer
        refused.append((layer, fault))
    return None


def _tried(attempt: Callable[[], object]) -> str:
    """Return why something can't be done, or "": a child process tries it first."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        fault = ""
        try:
            attempt()
        except OSError as error:
            fault = advice.reason(error)
        except BaseException as error:
            fault = type(error).__name__
        finally:
            os.write(writing, (fault or ".").encode()[:4096])
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    os.waitpid(child, 0)
    return "" if said == "." else said or "the attempt ended without a word"


def _listener() -> None:
    os.close(kernel.install_filter([(RET, 0, 0, ALLOW)], listener=True))


def _filter() -> None:
    kernel.install_filter([(RET, 0, 0, ALLOW)], listener=False)


def _user_alone() -> None:
    namespaces.enter_unprivileged(network=False)


def _move(layer: str, listening: str) -> str:
    """Do the first part of a layer; return why it can't be done, or ""."""
    fault = _tried(_filter)
    if fault:
        return f"seccomp: {fault}"
    if layer == ROOT:
        if os.geteuid() != 0:
            return "not root"
        return _done(namespaces.enter_as_root)
    if layer == USER:
        return _done(namespaces.enter_unprivileged)
    if layer == GIVEN:
        others = namespaces.interfaces()
        return f"this network has {', '.join(others)}" if others else ""
    if layer == BROKER:
        if listening:
            return f"no listener: {listening}"
        if os.geteuid() != 0 and not _tried(_user_alone):
            # The broker may then look into all that run here, whatever ptrace_scope says.
            _user_alone()
    return ""


def _done(step: Callable[[], None]) -> str:
    fault = _tried(step)
    if not fault:
        step()
    return fault


def _diag() -> socket.socket | None:
    try:
        return unix_diag.connection()
    except OSError:
        return None


def _settle(
    request: JailRequest,
    scene: Scene,
    environ: MutableMapping[str, str],
    sudo: tuple[int, int, str] | None,
) -> tuple[str, str]:
    """Give up what a job doesn't need; return words for whom it runs as, and for its files."""
    if sudo:
        namespaces.become(*sudo)
        if not os.access(os.__file__, os.R_OK):
            raise JailError(
                f"a sealed job runs as the user who called sudo (uid {sudo[0]}), who can't read"
                f" Python's library at {os.path.dirname(os.__file__)}. Call mst without sudo, or"
                " with a Python that the user can read."
            )
        home = namespaces.home_of(sudo[0])
        if home:
            environ["HOME"] = home
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    # A change of credentials takes away that one may look at oneself in /proc.
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
    user = f"uid {os.geteuid()} without capabilities"
    return user, _limit_writes(request, scene, environ)


def _limit_writes(request: JailRequest, scene: Scene, environ: Mapping[str, str]) -> str:
    version = landlock.abi()
    if version < landlock.LEAST_ABI:
        return f"not limited: Landlock is {'version 1' if version else 'not in this kernel'}"
    named = [Path(each) for each in scene.outputs]
    for each in named:
        if _nearest(each) == Path("/"):
            raise JailError(
                f"{each} does not exist, and a sealed job can make nothing in /. Make the directory"
                " first."
            )
    rdma = bool(request.allow_net)
    places = landlock.nodes() if scene.reads_only else landlock.writable(environ, named, rdma=rdma)
    try:
        landlock.restrict(places, version)
    except OSError as error:
        return f"not limited: {error.strerror or error}"
    return f"Landlock, version {version}"


def _nearest(path: Path) -> Path:
    whole = path.expanduser().absolute()
    return next(each for each in (whole, *whole.parents) if each.exists())


def _looks(broker: Broker) -> str:
    """Return why the broker can't look into this process, or ""."""
    with suppress(OSError):  # the kernel has no Yama
        kernel.prctl(kernel.PR_SET_PTRACER, broker.process)
    answer = broker.ask({"ask": "look", "process": os.getpid(), "descriptor": broker.talk.fileno()})
    return str(answer["fault"])


def _rules(layer: str, brokered: bool) -> Rules:
    if layer == SECCOMP:
        return Rules(unix="none", inet="none")
    unix = "broker" if brokered else "none"
    return Rules(unix=unix, inet="broker" if layer == BROKER else "namespace")


def _fall_shut(layer: str, rules: Rules, broker: Broker, diag: socket.socket | None) -> None:
    """Put the filter over this process, and give its listener to the broker."""
    machine = kernel.machine()
    assert machine is not None
    try:
        listener = kernel.install_filter(instructions(machine, rules), rules.listener)
    except OSError as error:
        raise JailError(f"the filter was refused: {advice.reason(error)}.") from None
    if rules.listener:
        descriptors = [listener] + ([diag.fileno()] if diag else [])
        message = {"ask": "judge", "process": os.getpid(), "host": layer == BROKER}
        broker.ask(message, descriptors)
        os.close(listener)
    if diag is not None:
        diag.close()
