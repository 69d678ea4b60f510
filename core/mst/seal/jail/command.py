"""The commands that are sealed: their options, and the way in before they begin."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from mst.seal.audit import record
from mst.seal.jail import words
from mst.seal.jail.seal import MODES, OFF, JailRequest, Scene, Seal, check

if TYPE_CHECKING:
    from mst.request import TrainRequest

SEALED = frozenset({"train", "eval", "merge", "export", "chat", "serve", "ui"})
# Of commands that have several actions, those that read what strangers wrote or load a vendor's
# code. What `mst bench` measures are commands of mst, each in a jail of its own.
SEALED_ACTIONS = {"models": frozenset({"convert"}), "bench": frozenset({"peak", "peer"})}
# Options whose value is a place to write to.
_OUTPUTS = ("output_dir", "output", "predictions", "offload_dir", "resume", "run")


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the jail to a sealed command; `mst train` has them in its request."""
    if name == "train" or name not in SEALED | SEALED_ACTIONS.keys():
        return
    group = parser.add_argument_group("seal")
    group.add_argument(
        "--jail", choices=MODES, default="auto", help="what keeps the job off every network (auto)"
    )
    group.add_argument("--jail-reason", metavar="TEXT", help="why, with --jail off; recorded")
    group.add_argument(
        "--allow-net",
        nargs="+",
        action="extend",
        default=None,
        metavar="CIDR",
        help="networks of the job's other machines",
    )


def asked(
    name: str, args: argparse.Namespace, environ: MutableMapping[str, str]
) -> tuple[JailRequest, Scene]:
    """Return what a command's options ask of the jail, and where its job stands.

    The name of the machine where all meet is looked up here, for inside there is no name server.

    Raises:
        UsageError: they don't fit together.
    """
    outputs = tuple(
        value
        for value in (getattr(args, each, None) for each in _OUTPUTS)
        if isinstance(value, str) and value not in ("", "last")
    )
    if name != "train":
        request = JailRequest(args.jail, args.jail_reason, tuple(args.allow_net or ()))
        # What stays outside beside the page takes requests from it, and reads runs on its own.
        reads_only = name == "ui"
        listeners = getattr(args, "listeners", ())
        scene = Scene(outputs=outputs, listeners=listeners, reads_only=reads_only)
    else:
        from mst.cli.options import train_request
        from mst.placement import placement

        train = train_request(args)
        request = of_request(train)
        place = placement(environ, train)
        scene = Scene(outputs=(*outputs, *outputs_of(train)))
        if place is not None:
            address = _looked_up(place.address)
            if place.starter == "torchrun":
                environ["MASTER_ADDR"] = address
            else:
                args.master_addr = address
            scene = Scene(True, (address, place.port), place.nnodes, scene.outputs)
    check(request, scene)
    return request, scene


def of_request(train: TrainRequest) -> JailRequest:
    """Return what a training request asks of the jail."""
    return JailRequest(train.jail, train.jail_reason, train.allow_net)


def outputs_of(train: TrainRequest) -> tuple[str, ...]:
    """Return the places that a training request writes to."""
    values = (train.output_dir, train.offload_dir, train.resume)
    return tuple(each for each in values if each and each != "last")


def _looked_up(host: str) -> str:
    with contextlib.suppress(OSError):
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    return host  # what comes next says that it isn't known


def _converts(args: argparse.Namespace) -> bool:
    """Return whether a command may convert a model, and keep what that makes."""
    for each in ("target", "model"):
        if hasattr(args, each):
            named = getattr(args, each)
            return named is None or not Path(named).is_dir()
    return False


def enter(name: str, args: argparse.Namespace, environ: MutableMapping[str, str]) -> Seal:
    """Seal this process, say so, and return what holds.

    Raises:
        UsageError: the options don't fit together.
        JailError: this machine gives no jail, or it leaks.
    """
    from mst.seal.jail import ladder, landlock

    request, scene = asked(name, args, environ)
    if name == "train" or _converts(args):
        landlock.make_cache(environ)
    seal = ladder.enter(request, scene, environ)
    _say(args, seal.line())
    if seal.layer != OFF:
        environ[words.VARIABLE] = words.told(seal)
        words.explain(environ)
    return seal


def _say(args: argparse.Namespace, line: str) -> None:
    """Print a line where standard output is for people; a program reads answers there."""
    if not getattr(args, "json", False) and getattr(args, "prompt", None) is None:
        print(line, flush=True)


def inside(
    name: str,
    environ: MutableMapping[str, str],
    run: Callable[[argparse.Namespace], int],
    own_process: bool,
    outside: Callable[[argparse.Namespace], AbstractContextManager[None]] | None = None,
    unsealed: Callable[[argparse.Namespace], str | None] | None = None,
) -> Callable[[argparse.Namespace], int]:
    """Return a command that seals itself before it begins; `run` itself if it isn't a sealed one.

    The audit log is open by then: what is inside can add to it, and need not have the right to open
    its files.

    Args:
        name: of the command.
        environ: the process's environment, to which what the job needs is added.
        run: the command.
        own_process: the process is the command's own. Otherwise what it starts is sealed.
        outside: what the command does before it is sealed, and undoes in the end. Listening
            sockets that it is to take with it are put into `args.listeners`.
        unsealed: returns why this call of the command needs no jail; None where it does.
    """

    def sealed(args: argparse.Namespace) -> int:
        why_not = None if unsealed is None else unsealed(args)
        if why_not is not None:
            _say(args, f"seal    {why_not}")
            record("jail.not_entered", reason=why_not)
            return run(args)
        with contextlib.nullcontext() if outside is None else outside(args):
            return entered(args)

    def entered(args: argparse.Namespace) -> int:
        if own_process:
            record("jail.entered", **enter(name, args, environ).to_json())
            return run(args)
        from mst.seal.jail.holder import asking

        with asking(*asked(name, args, environ)):
            return run(args)

    def sealed_action(args: argparse.Namespace) -> int:
        return (sealed if args.action in SEALED_ACTIONS[name] else run)(args)

    if name in SEALED_ACTIONS:
        return sealed_action
    return sealed if name in SEALED else run


def write(seal: Seal | None, path: Path) -> None:
    """Write a jail as JSON, at once.

    Raises:
        OSError: it can't be written.
    """
    from mst.durable import write_text

    if seal is not None:
        write_text(path, json.dumps(seal.to_json(), indent=2, ensure_ascii=False) + "\n")
