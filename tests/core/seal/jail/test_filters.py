"""The seccomp programs, run by an interpreter, for machines that nobody here has too."""

from __future__ import annotations

import errno
import struct

import pytest

from mst.seal.jail.filters import (
    ALLOW,
    KILL,
    MSG_FASTOPEN,
    NOTIFY,
    REFUSED_ALWAYS,
    TIOCSTI,
    Instruction,
    Rules,
    instructions,
    packed,
    refuse,
)
from mst.seal.jail.syscalls import AARCH64, MACHINES, X86_64, Machine

NAMESPACE = Rules(unix="broker", inet="namespace")
BROKER = Rules(unix="broker", inet="broker")
ALONE = Rules(unix="none", inet="none")
STREAM, DATAGRAM, RAW, SEQUENCED, CLOEXEC = 1, 2, 3, 5, 0o2000000
UNIX, INET, INET6, NETLINK = 1, 2, 10, 16


def run(program: list[Instruction], data: bytes) -> int:
    """Do what the kernel does with a seccomp program (net/core/filter.c)."""
    at, accumulator = 0, 0
    for _ in range(len(program)):
        code, yes, no, k = program[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif code == 0x54:
            accumulator &= k
        elif code == 0x06:
            return k
        else:
            hit = {
                0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)
            }[code]  # fmt: skip
            at += yes if hit else no
    raise AssertionError("no return")


def asked(machine: Machine, rules: Rules, name: str | int, *arguments: int, audit: int = 0) -> int:
    number = machine.numbers[name] if isinstance(name, str) else name
    words = [each & (2**64 - 1) for each in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.pack("=IIQ6Q", number, audit or machine.audit, 0, *words)
    return run(instructions(machine, rules), data)


def denied(action: int) -> bool:
    return action & 0xFFFF0000 == 0x00050000


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Machine:
    return MACHINES[request.param]


@pytest.mark.parametrize("rules", [NAMESPACE, BROKER, ALONE])
def test_what_no_job_needs_is_refused(machine: Machine, rules: Rules) -> None:
    for name in set(REFUSED_ALWAYS) & set(machine.numbers):
        assert asked(machine, rules, name) == refuse(errno.EPERM), name
    assert asked(machine, rules, "clone3") == refuse(errno.ENOSYS)


@pytest.mark.parametrize("rules", [NAMESPACE, BROKER, ALONE])
def test_no_other_family_is_left(machine: Machine, rules: Rules) -> None:
    for family in set(range(64)) - {UNIX, INET, INET6, NETLINK}:
        for kind in (STREAM, DATAGRAM, RAW, SEQUENCED):
            assert denied(asked(machine, rules, "socket", family, kind)), family
            assert denied(asked(machine, rules, "socketpair", family, kind)), family


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        (NAMESPACE, {(UNIX, STREAM), (UNIX, SEQUENCED), (INET, STREAM), (INET, DATAGRAM),
                     (INET6, STREAM), (INET6, DATAGRAM)}),
        (BROKER, {(UNIX, STREAM), (UNIX, SEQUENCED), (INET, STREAM), (INET6, STREAM)}),
        (ALONE, set()),
    ],
)  # fmt: skip
def test_which_sockets_are_left(
    machine: Machine, rules: Rules, allowed: set[tuple[int, int]]
) -> None:
    for family in (UNIX, INET, INET6):
        for kind in range(16):
            for flags in (0, CLOEXEC):
                action = asked(machine, rules, "socket", family, kind | flags)

                assert (action == ALLOW) == ((family, kind) in allowed), (family, kind)


def test_protocols_with_a_way_of_their_own_are_refused(machine: Machine) -> None:
    for protocol in {*range(256), 256, 262} - {0, 6, 17}:  # SMC, MPTCP, SCTP, UDP-Lite …
        for kind in (STREAM, DATAGRAM):
            assert denied(asked(machine, NAMESPACE, "socket", INET, kind, protocol)), protocol
    assert denied(asked(machine, BROKER, "socket", INET, STREAM, 17))
    assert asked(machine, BROKER, "socket", INET6, STREAM, 6) == ALLOW


def test_netlink_is_for_routes_and_devices(machine: Machine) -> None:
    for rules in (NAMESPACE, BROKER, ALONE):
        left = [each for each in range(64) if asked(machine, rules, "socket", 16, 3, each) == ALLOW]

        assert left == [0, 15]


def test_high_bits_of_an_argument_change_nothing(machine: Machine) -> None:
    # The kernel takes an int: what is above it must not make a family look like another.
    assert denied(asked(machine, NAMESPACE, "socket", 40 | 1 << 32, STREAM))
    assert denied(asked(machine, ALONE, "socket", INET | 1 << 40, STREAM))
    assert denied(asked(machine, BROKER, "sendmsg", 3, 0, MSG_FASTOPEN | 1 << 33))
    assert denied(asked(machine, BROKER, "ioctl", 0, TIOCSTI | 1 << 32))


def test_the_broker_is_asked_where_something_is_to_be_judged(machine: Machine) -> None:
    assert asked(machine, NAMESPACE, "connect", 3) == NOTIFY
    assert asked(machine, NAMESPACE, "bind", 3) == ALLOW
    for name in ("connect", "bind", "listen"):
        assert asked(machine, BROKER, name, 3) == NOTIFY
        assert asked(machine, ALONE, name, 3) == ALLOW


def test_sending_asks_nobody(machine: Machine) -> None:
    for rules in (NAMESPACE, BROKER, ALONE):
        for name, flags in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
            quiet = [0] * flags
            assert asked(machine, rules, name, *quiet, 0x4000) == ALLOW
            if rules is BROKER:
                assert denied(asked(machine, rules, name, *quiet, MSG_FASTOPEN))


def test_processes_are_started_without_namespaces_of_their_own(machine: Machine) -> None:
    assert asked(machine, NAMESPACE, "clone", 0x3D0F00) == ALLOW  # pthread_create's
    for bit in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert denied(asked(machine, NAMESPACE, "clone", bit | 17))


def test_a_process_cannot_be_its_own_broker(machine: Machine) -> None:
    assert asked(machine, NAMESPACE, "seccomp", 1, 0) == ALLOW
    assert denied(asked(machine, NAMESPACE, "seccomp", 1, 8))
    assert denied(asked(machine, NAMESPACE, "seccomp", 1, 8 | 1))


def test_calls_of_another_convention_end_the_process(machine: Machine) -> None:
    for audit in (0x40000003, 0x40000028, X86_64.audit, AARCH64.audit):  # i386, arm
        action = asked(machine, NAMESPACE, "connect", 3, audit=audit)

        assert (action == KILL) == (audit != machine.audit)


def test_x32_has_no_calls() -> None:
    for name in ("socket", "connect", "io_uring_setup"):
        number = X86_64.numbers[name] | 0x40000000

        assert asked(X86_64, NAMESPACE, number) == refuse(errno.ENOSYS)


@pytest.mark.parametrize("rules", [NAMESPACE, BROKER, ALONE])
def test_the_programs_are_well_formed(machine: Machine, rules: Rules) -> None:
    program = instructions(machine, rules)
    for at, (code, yes, no, _) in enumerate(program):
        if code in (0x15, 0x35, 0x45):
            assert max(yes, no) < 256
            assert at + 1 + max(yes, no) < len(program)

    assert len(program) <= 4096  # BPF_MAXINSNS
    assert len(packed(program)) == 8 * len(program)


def test_the_tables_name_each_call_once(machine: Machine) -> None:
    assert len(set(machine.numbers.values())) == len(machine.numbers)
    assert set(X86_64.numbers) - set(AARCH64.numbers) == {"iopl", "ioperm"}
