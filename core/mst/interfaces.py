"""Which network interface leads to another machine, as the kernel would choose it."""

from __future__ import annotations

import socket

from mst.errors import RunError


def route_to(address: str, port: int) -> tuple[str, str]:
    """Return the interface and the address of this machine that lead to another one.

    The kernel is asked: a datagram socket is connected, which sends nothing.

    Args:
        address: the other machine's name or number.
        port: any there.

    Raises:
        RunError: the name is not known, or no route leads there.
    """
    import psutil

    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address, port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise RunError(
            f"no route leads to --master-addr {address}: {error.strerror or error}. Give machine"
            " 0's address as `ip route get` on this machine finds it."
        ) from None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            # A machine reaches its own address over loopback, but others come in over the card.
            return name, own
    return "lo", own


def chosen(address: str, port: int, name: str | None) -> tuple[str, str]:
    """Return the interface to use towards a machine, and this machine's address on it.

    Args:
        address: the other machine's.
        port: any there.
        name: of the interface that the user has named, if so.

    Raises:
        RunError: there is none of that name, or no route.
    """
    import psutil

    if not name:
        return route_to(address, port)
    here = psutil.net_if_addrs()
    found = [
        each.address
        for each in here.get(name, [])
        if each.family in (socket.AF_INET, socket.AF_INET6) and "%" not in each.address
    ]
    if not found:
        raise RunError(
            f"GLOO_SOCKET_IFNAME is {name}; here are {', '.join(sorted(here))}, and it must have an"
            " address. Unset it, or name another one."
        )
    return name, found[0]
