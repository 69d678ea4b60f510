"""Who may come in to a port that a job listens on: the kernel drops packets of all others."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterable, Sequence

from mst.seal.jail.filters import AND, JEQ, LOAD, RET, Instruction, packed
from mst.seal.jail.sockaddr import Network

_LOAD_BYTE = 0x30
# <linux/filter.h>: an offset that counts from the network header.
_NETWORK = 0xFFF00000
_SO_ATTACH_FILTER, _SO_LOCK_FILTER = 26, 44
_KEEP, _DROP = (RET, 0, 0, 0xFFFFFFFF), (RET, 0, 0, 0)


def _inside(network: Network, source: int) -> list[Instruction]:
    """Return instructions that keep a packet whose source lies in a network, else go on."""
    raw, mask = network.network_address.packed, network.netmask.packed
    words = [
        (struct.unpack_from("!I", raw, at)[0], struct.unpack_from("!I", mask, at)[0], at)
        for at in range(0, len(raw), 4)
    ]
    parts: list[list[Instruction]] = [
        [(LOAD, 0, 0, _NETWORK + source + at), (AND, 0, 0, bits), (JEQ, 0, 0, value)]
        for value, bits, at in words
        if bits
    ]
    left = sum(map(len, parts)) + 1
    made: list[Instruction] = []
    for part in parts:
        left -= len(part)
        made += [*part[:-1], (JEQ, 0, left, part[-1][3])]
    return [*made, _KEEP]


def program(networks: Iterable[Network]) -> list[Instruction]:
    """Return a socket filter that keeps packets from `networks`, and drops all others."""
    given = list(networks)
    four = [each for one in given if one.version == 4 for each in _inside(one, 12)] + [_DROP]
    six = [each for one in given if one.version == 6 for each in _inside(one, 8)] + [_DROP]
    return [
        (_LOAD_BYTE, 0, 0, _NETWORK),
        (AND, 0, 0, 0xF0),
        (JEQ, 1, 0, 0x40),
        # Too far for a conditional jump's byte when there are many networks.
        (0x05, 0, 0, len(four)),
        *four,
        *six,
    ]


def guard(listening: socket.socket, networks: Sequence[Network]) -> None:
    """Let in nobody but `networks`; what is accepted from the socket is guarded alike.

    Raises:
        OSError: the kernel refuses.
    """
    made = program(networks)
    code = ctypes.create_string_buffer(packed(made))
    described = struct.pack("HxxxxxxQ", len(made), ctypes.addressof(code))
    listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)
    listening.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
