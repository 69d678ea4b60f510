"""What a jailed process must not inherit: sockets and proxies."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, MutableMapping
from contextlib import suppress

from mst.launch import offline_environment

_PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
# Where agents and daemons are met; the sockets are refused, so nothing is gained by knowing them.
_AGENTS = (
    "SSH_AUTH_SOCK", "GPG_AGENT_INFO", "DBUS_SESSION_BUS_ADDRESS", "DOCKER_HOST", "NOTIFY_SOCKET",
    "WAYLAND_DISPLAY", "DISPLAY",
)  # fmt: skip
# NCCL hands memory over by unix datagrams otherwise, which the filter refuses.
_WITHOUT_DATAGRAMS = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}


def close_sockets(keep: Collection[int] = ()) -> int:
    """Close the sockets that this process has inherited, and return how many they were.

    Standard input, output and error stay when they are sockets: a service manager's log, or the
    terminal of a remote shell.

    Args:
        keep: descriptors of mst's own.
    """
    closed = 0
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number <= 2 or number in keep:
            continue
        with suppress(OSError):  # the listing's own descriptor is gone
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                os.close(number)
                closed += 1
    return closed


def open_sockets() -> list[int]:
    """Return the descriptors from 3 on that are sockets."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if int(name) > 2 and stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.append(int(name))
    return found


def clean_environment(environ: MutableMapping[str, str]) -> None:
    """Take proxies and agents out of the environment, and put in what keeps libraries offline."""
    for name in list(environ):
        if name.lower() in _PROXIES or name in _AGENTS:
            del environ[name]
    offline = {**offline_environment(), **_WITHOUT_DATAGRAMS, "HF_DATASETS_OFFLINE": "1"}
    environ.update(
        {
            name: value
            for name, value in offline.items()
            # How ranks meet is the launcher's to say.
            if not name.endswith("_SOCKET_IFNAME")
        }
    )
