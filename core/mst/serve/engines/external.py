"""An engine beside the built-in one, as the HTTP side sees it: requests are handed on whole."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mst.registry import load
from mst.serve.engine import EngineFailure, EngineFigures, Prompt, Token
from mst.serve.engines.found import command_of
from mst.serve.engines.job import ExternalJob
from mst.serve.engines.process import Patience, Supervised
from mst.serve.engines.upstream import Address

# A socket's name has room for 107 bytes (unix(7)), and engines make names of their own in there.
_LONGEST_DIRECTORY = 50


class ExternalEngine:
    """Counts what is handed on; a stand-in where the HTTP side asks for figures and limits."""

    adapters: Sequence[str] = ()

    def __init__(self, job: ExternalJob, supervised: Supervised) -> None:
        """Hand on to this process."""
        self.job, self.supervised = job, supervised
        self.context = job.start.context
        self._figures, self._lock = EngineFigures(batch_limit=job.start.batch), threading.Lock()

    @property
    def name(self) -> str:
        """Of the engine, with its version."""
        return f"{self.job.name} {self.job.version}"

    def submit(self, prompt: Prompt, told: Callable[[Token | EngineFailure], None]) -> int:
        """Refuse: requests are handed on whole, `mst.serve.http.forward`."""
        raise EngineFailure(f"{self.name} takes whole requests.")

    def cancel(self, ticket: int) -> None:
        """Do nothing: leaving a connection is what ends an answer."""

    def embed(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Refuse, as `submit`."""
        raise EngineFailure(f"{self.name} takes whole requests.")

    def figures(self) -> EngineFigures:
        """Return what was handed on, and how often the engine was started again."""
        with self._lock:
            return replace(self._figures, restarts=self.supervised.restarts)

    def count(self, **more: int) -> None:
        """Add to figures by their names."""
        with self._lock:
            added = {name: getattr(self._figures, name) + by for name, by in more.items()}
            self._figures = replace(self._figures, **added)

    def close(self) -> None:
        """End the engine's processes."""
        self.supervised.close()


@contextlib.contextmanager
def started(
    job: ExternalJob,
    environ: Mapping[str, str],
    say: Callable[[str], None],
    given_up: Callable[[], None],
    patience: Patience | None = None,
) -> Iterator[ExternalEngine]:
    """Start an engine, wait until it takes requests, yield it, and end it.

    Args:
        job: which.
        environ: the process's environment.
        say: is told a line when it ends and when it is back.
        given_up: as of `Supervised`.
        patience: how long it is waited for.

    Raises:
        PlanError: its plugin gives no command.
        EngineEnded: it doesn't start.
    """
    long = len(os.fsencode(tempfile.gettempdir())) > _LONGEST_DIRECTORY
    # For its user alone: whoever connects to the engine itself needs no key.
    with tempfile.TemporaryDirectory(prefix="mst-engine-", dir="/tmp" if long else None) as place:
        if "unix" in job.listens:
            address = Address(socket=f"{place}/engine")
        else:
            address = Address(port=_free_port())
        start = replace(job.start, socket=address.socket, port=address.port)
        start = replace(start, cache_dir=_made(start.cache_dir, Path(place)))
        command = command_of(load(), job.name, start)
        # What an engine leaves behind there goes with the directory.
        own = {**environ, "TMPDIR": place}
        supervised = Supervised(job.name, command, address, own, say, given_up, patience)
        engine = ExternalEngine(job, supervised)
        try:
            supervised.start()
            yield engine
        finally:
            engine.close()


def _made(directory: str, otherwise: Path) -> str:
    """Return a directory for caches, made where it isn't there; another where it can't be made."""
    try:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return str(otherwise)
    return directory


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])
