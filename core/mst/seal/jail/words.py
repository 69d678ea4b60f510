"""What a refused connection says: Python code inside learns why, and which option opens it.

It only explains. Whoever goes past Python meets the kernel.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import sys
from collections.abc import Mapping
from typing import Any

from mst.seal.jail import kernel
from mst.seal.jail.seal import OFF, WORDS, Seal

# For a sealed process's children; not trusted.
VARIABLE = "MST_SEAL"


def told(seal: Seal) -> str:
    """Return what the children of a sealed process are told."""
    facts = {"layer": seal.layer, "allow_net": seal.allow_net, "broker": seal.broker}
    return json.dumps(facts)


def inherited(environ: Mapping[str, str]) -> Seal:
    """Return the jail that a worker was started in, for one that starts workers of its own.

    They run where it runs. It is believed because only a sealed process, or one whose seal was
    turned off, starts workers; nobody else should ask.
    """
    facts: Any = None
    with contextlib.suppress(ValueError):
        facts = json.loads(environ.get(VARIABLE, ""))
    if not isinstance(facts, dict):
        return Seal(OFF, reason="as the process that started it")
    return Seal(str(facts.get("layer")), allow_net=tuple(facts.get("allow_net", ())))


def explain(environ: Mapping[str, str]) -> None:
    """Let this process's refused connections say why, when it was started in a jail."""
    facts: Any = None
    with contextlib.suppress(ValueError):
        facts = json.loads(environ.get(VARIABLE, ""))
    if not isinstance(facts, dict):
        return
    with contextlib.suppress(OSError, ValueError, TypeError):  # a kernel without Yama
        kernel.prctl(kernel.PR_SET_PTRACER, int(facts["broker"]))
    networks = []
    with contextlib.suppress(ValueError, TypeError, KeyError):
        networks = [ipaddress.ip_network(each, strict=False) for each in facts["allow_net"]]
    layer = WORDS.get(str(facts.get("layer")), "a jail")
    open_to_some = bool(networks)

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto"):
            place = arguments[1]
            if isinstance(place, tuple) and not _allowed(place[0], networks):
                raise PermissionError(f"mst: connecting to {place[0]} was refused: {_why(layer)}")
        elif event == "socket.getaddrinfo" and not open_to_some:
            host = arguments[0]
            if isinstance(host, (str, bytes)) and not _known(host):
                shown = host if isinstance(host, str) else host.decode(errors="replace")
                raise PermissionError(f"mst: looking up {shown} was refused: {_why(layer)}")

    sys.addaudithook(look)


def _why(layer: str) -> str:
    return (
        f"this job is sealed ({layer}). Its own machines are named with --allow-net; everything a"
        " job needs has to lie on this machine."
    )


def _allowed(host: object, networks: list[Any]) -> bool:
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:  # a name: it is looked up first, and that is judged
        return True
    return (
        address.is_loopback
        or address.is_unspecified
        or any(address in each for each in networks if each.version == address.version)
    )


def _known(host: str | bytes) -> bool:
    text = host.decode(errors="replace") if isinstance(host, bytes) else host
    if text in ("", "localhost", "localhost.localdomain", "ip6-localhost", socket.gethostname()):
        return True
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(text.partition("%")[0])
        return True
    return False
