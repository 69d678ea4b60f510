"""Two machines on this one: network namespaces with addresses of their own, and a cable."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest


def ip(*words: str) -> None:
    """Call iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def cabled(prefix: str, card: str, addresses: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the names of two network namespaces with a cable between them; skip where none can be.

    Args:
        prefix: of the names, which this process's number follows.
        card: name of the network card in both.
        addresses: of the first and the second.
    """
    names = (f"{prefix}a{os.getpid()}", f"{prefix}b{os.getpid()}")
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", card, "netns", names[0], "type", "veth", "peer", card, "netns",
           names[1])  # fmt: skip
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
            ip("-n", name, "link", "set", card, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"wants two network namespaces, which need root and iproute2: {error}")
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
