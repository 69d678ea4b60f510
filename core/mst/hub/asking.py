"""The process that asks a hub, seen from the command that started it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from mst import serial
from mst.errors import EXIT_REFUSED, Interrupted, ModelError, MstError
from mst.hub.source import HUGGING_FACE, Listing
from mst.hub.worker import Asked, ToFetch, Wanted
from mst.seal.audit import record

# Told the name of the file that is being fetched, how much of it is there, and its size.
Progress: TypeAlias = Callable[[str, int, int], None]

_SHOWN_EVERY = 0.3
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
# Accounts of a user's, and what would have a library say or send more than it must.
_TAKEN_OUT = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_DEBUG", "HF_HUB_ENABLE_HF_TRANSFER",
    "HUGGINGFACE_CO_STAGING", "HF_HUB_USER_AGENT_ORIGIN", "MODELSCOPE_API_TOKEN",
    "MODELSCOPE_SDK_DEBUG", "MODELSCOPE_CLOUD_USERNAME", "MODELSCOPE_CLOUD_ENVIRONMENT",
)  # fmt: skip


class HostNotNamed(MstError):
    """The hub sends us where the user has not agreed to go; nothing was asked there."""

    exit_code = EXIT_REFUSED


class Hub:
    """A hub that is being asked."""

    def __init__(self, asked: Asked, process: subprocess.Popen[bytes]) -> None:
        """Ask through this process."""
        self._asked = asked
        self._process = process
        self._rest = b""

    def listing(self) -> Listing:
        """Return what the repository holds.

        Raises:
            ModelError: there is no such repository or revision, or the hub can't be reached.
            HostNotNamed: it sends us to another host.
        """
        kind, value = self._next()
        if kind != "listing":
            raise self._trouble(kind, value, "")
        found = serial.from_json(Listing, value)
        if not found.revision.isprintable():  # it would steer the terminal that shows it
            raise self._trouble("failed", "its revision has a name that can't be shown", "")
        return found

    def fetch(self, wanted: ToFetch, progress: Progress | None) -> Iterator[str]:
        """Fetch files, and yield the name of each that has come whole by its size.

        Raises:
            ModelError: a file can't be fetched.
            HostNotNamed: the hub sends us to another host for it.
        """
        self._send(serial.to_json(wanted))
        sizes = {each.name: each for each in wanted.files}
        name = ""
        for _ in range(2 * len(wanted.files)):
            look = partial(_show, sizes[name], progress) if progress and name else None
            kind, value = self._next(look)
            if kind == "begun" and value in sizes:
                name = value
            elif kind == "done" and value in sizes:
                if progress is not None:
                    progress(value, sizes[value].bytes, sizes[value].bytes)
                yield value
            else:
                raise self._trouble(kind, value, name)

    def _send(self, value: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ModelError(
                "the process that asks the hub ended by itself. Run the command again."
            ) from None

    def _next(self, look: Callable[[], None] | None = None) -> tuple[str, Any]:
        """Return the process's next answer; `look` is called while it is waited for."""
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            ready, _, _ = select.select([handle], [], [], _SHOWN_EVERY)
            if not ready:
                if look is not None:
                    look()
                continue
            block = os.read(handle, 1 << 16)
            if not block:
                return "failed", "it ended without an answer"
            self._rest += block
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            ((kind, value),) = json.loads(line).items()
        except (ValueError, AttributeError):
            return "failed", "its answer is none"
        return str(kind), value

    def _trouble(self, kind: str, value: Any, file: str) -> MstError:
        asked = self._asked
        host = urlsplit(asked.endpoint).hostname
        what = f"{file} of {asked.repository}" if file else asked.repository
        if kind == "host":
            shown = "".join(each for each in str(value) if each.isprintable())[:200]
            record("pull.refused", host=shown, reason="not named")
            return HostNotNamed(
                f"{host} sends us to {shown} for {what}, a host that you have not named, so nothing"
                f" was asked of it. If you trust it, type the command again with --allow-host"
                f" {shown} (what was fetched is kept)."
            )
        if kind == "plain":
            record("pull.refused", host=str(value), reason="not encrypted")
            return HostNotNamed(
                f"{host} sends us to {value} for {what} over http, which is not encrypted, so"
                " nothing was asked there. Name another hub or mirror that keeps to https"
                " (--endpoint URL)."
            )
        if kind == "unreachable":
            return ModelError(
                f"no connection to {host} came about, for {what}. Is this machine online, and"
                f" {asked.endpoint} the address (--endpoint URL)? A proxy is used only when it is"
                " named by --allow-host. What was fetched is kept: run the command again."
            )
        if kind == "status":
            return ModelError(_refusal(asked, str(host), what, int(value)))
        return ModelError(
            f"{host} did not give {what} ({value}). Look at the connection and the address"
            " (--endpoint URL), and run the command again: what was fetched is kept."
        )


def _show(wanted: Wanted, progress: Progress) -> None:
    part = Path(wanted.part)
    have = part.stat().st_size if part.exists() else 0
    progress(wanted.name, min(have, wanted.bytes - 1), wanted.bytes)


def _refusal(asked: Asked, host: str, what: str, status: int) -> str:
    if status in (401, 403):
        sent = "the token was not accepted" if asked.token else "no token was sent"
        return (
            f"{host} refuses {what} ({status}; {sent}). It may be spelt differently, private, or"
            " given only to those who have accepted its licence on the hub's page. For an account:"
            " --token-file FILE, with its token in it."
        )
    if status == 404:
        revision = "" if asked.revision is None else f" at revision {asked.revision}"
        return f"{host} has no {what}{revision}. Check the spelling, ORG/NAME, and --revision."
    return f"{host} answers {status} for {what}. Try again later: what was fetched is kept."


@contextmanager
def asking(asked: Asked, environ: Mapping[str, str]) -> Iterator[Hub]:
    """Start the process that asks a hub, and end it with the block.

    Raises:
        Interrupted: Ctrl-C; what was fetched is kept.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "mst.hub.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=worker_environment(asked, environ),
    )
    hub = Hub(asked, process)
    try:
        hub._send(serial.to_json(asked))
        yield hub
    except KeyboardInterrupt:
        raise Interrupted(
            "Interrupted. What was fetched is kept; the same command goes on with it."
        ) from None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # what it no longer takes is not written
            if pipe is not None:
                pipe.close()
    until = time.monotonic() + 1
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    if process.poll() is None:
        process.kill()
    process.wait()


def proxies_not_named(asked: Asked, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that name a proxy which is not among the allowed hosts, to its host."""
    found = {}
    for name in environ:
        if name.upper() in _PROXIES and environ[name]:
            value = environ[name]
            try:
                host = urlsplit(value if "://" in value else f"//{value}").hostname or ""
            except ValueError:
                host = ""
            if host.lower() not in asked.allowed:
                found[name] = "".join(each for each in host if each.isprintable())
    return found


def worker_environment(asked: Asked, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the process that asks: no telemetry, no account, no other host.

    A proxy is a host too: one that was not named is not used.
    """
    unused = proxies_not_named(asked, environ)
    found = {
        key: value for key, value in environ.items() if key not in _TAKEN_OUT and key not in unused
    }
    found |= {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Its program has connections of its own, which no guard of ours sees.
        "HF_HUB_DISABLE_XET": "1",
        "DO_NOT_TRACK": "1",
        # requests would send the user's name and password for that host, in place of the token.
        "NETRC": os.devnull,
        # No module of the working directory is taken for a library.
        "PYTHONSAFEPATH": "1",
    }
    return found | ({"HF_ENDPOINT": asked.endpoint} if asked.hub == HUGGING_FACE else {})
