"""Run as `python -m mst.serve.http.worker JOB LISTENER CONTROL NOTES [KEYS]`, inside the jail."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

from mst import serial
from mst.data.template import load_template
from mst.data.tokens import TextTokenizer, load_tokenizer
from mst.errors import Interrupted
from mst.extensions import (
    NOT_FOR_ANSWERS,
    NOT_FOR_TEXT_ON_A_CPU,
    NOT_WITHOUT_ADAPTERS,
    hide_packages,
)
from mst.seal.keys.ring import KeyRing, inherited
from mst.serve.engine import Engine
from mst.serve.engines.external import ExternalEngine, started
from mst.serve.engines.process import EngineEnded
from mst.serve.http.access import Keys, Names
from mst.serve.http.app import App, log_line
from mst.serve.http.job import ServeJob
from mst.serve.http.prompts import Reader
from mst.serve.http.server import serve
from mst.serve.http.service import Service
from mst.serve.http.wire import Exchange
from mst.serve.job import EngineJob
from mst.worker_process import die_with_parent, guarded, say

# How often the uses of keys are written into the audit log.
_NOTE_SECONDS = 3600.0


class Notes:
    """What the audit log is told: uses of keys, as counts. The command's own process writes it."""

    def __init__(self, pipe: int) -> None:
        """Write lines of JSON into this pipe."""
        self._pipe = pipe
        self._used: dict[str, Counter[str]] = {}
        self._lock = threading.Lock()

    def add(self, exchange: Exchange) -> None:
        """Count a request of a key."""
        if exchange.key is None:
            return
        with self._lock:
            used = self._used.setdefault(exchange.key.name, Counter())
            used["requests"] += 1
            used["refused"] += exchange.status >= 400
            used["prompt_tokens"] += exchange.prompt_tokens
            used["completion_tokens"] += exchange.completion_tokens

    def write(self) -> None:
        """Tell what was counted since the last time."""
        with self._lock:
            used, self._used = self._used, {}
        for name, counts in used.items():
            self._line("serve.key", {"key": name, **counts})

    def end(self, app: App) -> None:
        """Tell what is left, and that the server has ended."""
        self.write()
        self._line("serve.ended", dict(app.metrics.totals()))

    def every_hour(self) -> None:
        """Write by itself from here on."""
        timer = threading.Timer(_NOTE_SECONDS, self._again)
        timer.daemon = True
        timer.start()

    def _again(self) -> None:
        self.write()
        self.every_hour()

    def _line(self, event: str, facts: dict[str, str | int]) -> None:
        with suppress(OSError):  # who would read it is gone
            os.write(self._pipe, json.dumps({"event": event, **facts}).encode() + b"\n")


def application(job: ServeJob, engine: Engine, reader: Reader, notes: Notes) -> App:
    """Return the application of a job."""
    external = engine if isinstance(engine, ExternalEngine) else None
    service = Service(job.name, engine, reader, job.limits.most_tokens, external=external)
    access = job.access
    names = Names(access.hosts, access.any_address, access.any_name)
    keys = Keys(None if access.keys_file is None else Path(access.keys_file))

    def noted(exchange: Exchange) -> None:
        notes.add(exchange)
        if job.access_log:
            say(log_line(exchange))

    return App(service, names, keys, job.limits, noted, job.web)


def work(job: ServeJob, listener: int, control: int, pipe: int, keys: KeyRing) -> None:
    """Load the model, and serve it until told to end.

    Raises:
        MstError: it can't be loaded.
        Interrupted: Ctrl-C, while it was loading.
    """
    model = job.engine.model
    directory = Path(model.tokenizer)
    tokenizer, template = load_tokenizer(directory), load_template(directory, model.template)
    with ExitStack() as held:
        engine = _loaded(job, tokenizer, keys, held)
        _serve(job, engine, Reader(tokenizer, template, engine.context), listener, control, pipe)
    if isinstance(engine, ExternalEngine) and engine.supervised.failure:
        raise EngineEnded(engine.supervised.failure)
    print("ended", flush=True)


def _loaded(job: ServeJob, tokenizer: TextTokenizer, keys: KeyRing, held: ExitStack) -> Engine:
    """Load the model here, or start the engine that does, which ends with `held`."""
    try:
        if job.external is not None:
            external = started(job.external, os.environ, _say_engine, _end)
            return held.enter_context(external)
        from mst.serve.loading import load_engine

        return load_engine(job.engine, keys, say, tokenizer, alone=True)
    except KeyboardInterrupt:
        raise Interrupted("stopped while the model was loading.") from None


def _say_engine(line: str) -> None:
    say(f"engine  {line}")


def _end() -> None:
    """End this server as SIGTERM does: what it has begun to tell its callers is told."""
    os.kill(os.getpid(), signal.SIGTERM)


def _serve(
    job: ServeJob, engine: Engine, reader: Reader, listener: int, control: int, pipe: int
) -> None:
    notes = Notes(pipe)
    app = application(job, engine, reader, notes)

    def began() -> None:
        notes.every_hour()
        names = ", ".join(app.service.models)
        by = f", by {engine.name}" if isinstance(engine, ExternalEngine) else ""
        say(f"ready   {names}, {engine.context} tokens, on {job.engine.torch_device}{by}")

    with socket.socket(fileno=listener) as made:
        try:
            serve(app, made, job.limits, job.access.tls, control, began)
        finally:
            engine.close()
            notes.end(app)


def _packages(job: EngineJob) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which optional packages a job needs, and which further ones it doesn't."""
    if job.model.quantization != "none":
        return ("bitsandbytes",), NOT_FOR_ANSWERS
    if job.torch_device != "cpu" or job.dequantized:
        return (), NOT_FOR_ANSWERS
    plain = job.model.adapter is None and not job.adapters
    return (), NOT_FOR_ANSWERS + NOT_FOR_TEXT_ON_A_CPU + (NOT_WITHOUT_ADAPTERS if plain else ())


def main(argv: list[str]) -> int:
    """Do the job that the first argument describes."""
    die_with_parent()
    job = serial.from_json(ServeJob, json.loads(argv[0]))
    hide_packages(*_packages(job.engine))
    listener, control, pipe, *rest = map(int, argv[1:])
    keys = inherited(rest[0] if rest else None)
    return guarded(lambda: work(job, listener, control, pipe, keys))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
