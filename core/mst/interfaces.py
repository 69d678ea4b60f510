"""Which network interface leads to another machine, as the kernel would choose it."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct

from mst.errors import RunError


def route_to(address: str, port: int) -> tuple[str, str]:
    """Return the interface and the address of this machine that lead to another one.

    The kernel is asked for its route over netlink, which works in a jail too.

    Args:
        address: the other machine's name or number.
        port: any there.

    Raises:
        RunError: the name is not known, or no route leads there.
    """
    import psutil

    try:
        place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][4]
        own = _source_towards(str(place[0]).partition("%")[0])
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


# <linux/rtnetlink.h>
_RTM_GETROUTE, _NLMSG_ERROR, _RTA_DST, _RTA_PREFSRC = 26, 2, 1, 7


def _source_towards(address: str) -> str:
    """Return this machine's address that the kernel would send from, to an address in digits.

    Raises:
        OSError: no route leads there.
    """
    target = ipaddress.ip_address(address)
    family = socket.AF_INET if target.version == 4 else socket.AF_INET6
    raw = target.packed
    # struct rtmsg, then one attribute: the destination.
    body = struct.pack("=BBBBBBBBI", family, 8 * len(raw), 0, 0, 0, 0, 0, 0, 0)
    body += struct.pack("=HH", 4 + len(raw), _RTA_DST) + raw
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        kernel.send(struct.pack("=IHHII", 16 + len(body), _RTM_GETROUTE, 1, 1, 0) + body)
        answer = kernel.recv(1 << 16)
    if struct.unpack_from("=H", answer, 4)[0] == _NLMSG_ERROR:
        number = -struct.unpack_from("=i", answer, 16)[0]
        raise OSError(number, os.strerror(number))
    at = 16 + 12
    while at + 4 <= len(answer):
        length, kind = struct.unpack_from("=HH", answer, at)
        if kind == _RTA_PREFSRC:
            return str(ipaddress.ip_address(answer[at + 4 : at + length]))
        at += max(4, (length + 3) & ~3)
    raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))


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
