"""Addresses as system calls take them: bytes to values."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

from mst.seal.jail.filters import AF_INET, AF_INET6, AF_UNIX

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Inet:
    """An address and a port; IPv4 written as IPv6 is IPv4."""

    address: Address
    port: int

    def __str__(self) -> str:
        """Return it as a person writes it."""
        shown = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{shown}:{self.port}"


@dataclass(frozen=True)
class Unix:
    """A unix socket's name: a path, or an abstract name without its leading zero byte."""

    name: bytes
    abstract: bool

    def __str__(self) -> str:
        """Return it as `ss` writes it."""
        return ("@" if self.abstract else "") + self.name.decode(errors="replace")


def parse(raw: bytes) -> Inet | Unix | None:
    """Return what a struct sockaddr names, or None when it is of another family or too short."""
    family = struct.unpack_from("=H", raw)[0] if len(raw) >= 2 else -1
    if family == AF_INET and len(raw) >= 16:
        return Inet(ipaddress.IPv4Address(raw[4:8]), struct.unpack_from("!H", raw, 2)[0])
    if family == AF_INET6 and len(raw) >= 24:
        address = ipaddress.IPv6Address(raw[8:24])
        return Inet(address.ipv4_mapped or address, struct.unpack_from("!H", raw, 2)[0])
    if family == AF_UNIX and len(raw) > 2:
        if raw[2] == 0:
            return Unix(raw[3:], abstract=True)
        return Unix(raw[2:].partition(b"\0")[0], abstract=False)
    return None
