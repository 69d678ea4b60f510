"""The kit's part for serving engines: one is started on a tiny model, and each promise tried.

Run as `python -m mst.conformance.serving_engine NAME WORKSPACE RESULTS DIRECTORY MODEL`: appends a
line of JSON for each check to the file RESULTS. The plugin's code runs in that process alone, the
engine in a jail.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mst.conformance.findings import Finding, Result, failed, passed, skipped, verdict
from mst.conformance.kit import results_of, write_results
from mst.conformance.tiny import tiny_model
from mst.errors import UsageError
from mst.registry import load
from mst.seal.jail.holder import asking, sealed
from mst.seal.jail.seal import JailRequest, Scene
from mst.serve.engines import FEATURES, EngineFacts, EngineStart, ModelToServe
from mst.serve.engines.environment import environment_dir
from mst.serve.engines.found import command_of, find_engines
from mst.serve.engines.last_words import LastWords
from mst.serve.engines.process import Patience, Supervised
from mst.serve.engines.target import model_to_serve
from mst.serve.engines.upstream import Address, asked

SECONDS = 900.0
_LOAD_SECONDS, _END_SECONDS = 600.0, 20.0
# Occurs nowhere else, so where it is found it was logged.
_MARK = "heliotrope-4711"
_CONTEXT, _NEW = 64, 4
_CHAT = {
    "model": "kit", "messages": [{"role": "user", "content": f"the {_MARK} card is late"}],
    "temperature": 0, "max_tokens": _NEW,
}  # fmt: skip


class _Everything(LastWords):
    """Keeps all that an engine writes, also after the first request."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def add(self, raw: bytes) -> None:
        self.written += raw
        super().add(raw)


@dataclass
class _Trial:
    """What the checks share; later ones look at what earlier ones have left."""

    name: str
    workspace: Path
    directory: str
    given: str
    facts: EngineFacts | None = None
    backend: str = "cpu"
    model: ModelToServe | None = None
    version: str = ""
    engine: Supervised | None = None
    words: list[_Everything] = field(default_factory=list)

    def place(self) -> Path:
        """Return where the engine's environment lies."""
        if self.directory:
            return Path(self.directory)
        return environment_dir(self.name, self.backend)


def _loads(trial: _Trial) -> Finding:
    registry = load()
    if trial.name not in registry.engines:
        reasons = [each.reason for each in registry.records if each.name == trial.name]
        found = "; ".join(filter(None, reasons)) or "no entry point in group mst has it"
        return failed(found, "`mst plugins` lists what was found")
    return passed("its hooks are whole")


def _tells(trial: _Trial) -> Finding:
    _, model = model_to_serve(trial.given or str(tiny_model(trial.workspace)), None, os.environ)
    (found,) = [
        each
        for each in find_engines(load(), model, trial.backend, (trial.name, trial.place()))
        if each.name == trial.name
    ]
    if found.facts is None or found.environment is None:
        return failed(found.fault, "return what the manual says, in 5 seconds")
    trial.model, trial.facts, trial.version = model, found.facts, found.environment.version
    facts, command = found.facts, found.environment.command
    faults = [f"{each.formats} has no source" for each in facts.serves if not each.source]
    faults += [f"listens has {each!r}" for each in facts.listens if each not in ("unix", "port")]
    faults += [f"features has {each!r}" for each in facts.features if each not in FEATURES]
    faults += [] if facts.listens else ["it listens nowhere"]
    faults += [] if command.strip() and "\n" not in command else ["it has no one command"]
    return verdict(faults, "say where each fact is from", f"{len(facts.serves)} kinds of weights")


def _light(trial: _Trial) -> Finding:
    if "torch" in sys.modules:
        return failed("torch was imported", "look at files alone: a choice needs no torch")
    return passed("torch was not imported")


def _starts(trial: _Trial) -> Finding:
    assert trial.facts is not None
    assert trial.model is not None
    serves = [each for each in trial.facts.serves if "merged" in each.formats]
    if not any(not each.backends or trial.backend in each.backends for each in serves):
        return skipped("it loads no whole model on a CPU, which the tiny one is for")
    if not trial.version:
        return skipped(f"it is not in {trial.place()}: make its environment first")
    unix = "unix" in trial.facts.listens
    address = Address(str(trial.workspace / "engine") if unix else None, None if unix else 23333)
    start_with = EngineStart(
        trial.model, "kit", trial.backend, "float32", _CONTEXT, 2, 1, str(trial.place()),
        str(trial.workspace), address.socket, address.port,
    )  # fmt: skip
    command = command_of(load(), trial.name, start_with)
    command = replace(command, arguments=tuple(sealed(command.arguments)))

    def words() -> LastWords:
        trial.words.append(_Everything())
        return trial.words[-1]

    patience = Patience(load_seconds=_LOAD_SECONDS, end_seconds=_END_SECONDS)
    trial.engine = Supervised(
        trial.name, command, address, os.environ, lambda line: None, lambda: None, patience, words
    )
    began = time.monotonic()
    trial.engine.start()
    seconds = time.monotonic() - began
    return passed(f"{trial.version} answers its health after {seconds:.1f} s", seconds=seconds)


def _asked(trial: _Trial, body: dict[str, Any]) -> tuple[int, list[bytes]]:
    """Return the status and the body of an answer, a stream's in its events."""
    assert trial.engine is not None
    address = trial.engine.address

    async def ask() -> tuple[int, list[bytes]]:
        async with asked(address, "/v1/chat/completions", json.dumps(body).encode()) as reply:
            if body.get("stream") and reply.status == 200:
                return reply.status, [each async for each in reply.events()]
            return reply.status, [await reply.whole()]

    return asyncio.run(ask())


def _answers(trial: _Trial) -> Finding:
    from pydantic import ValidationError

    from mst.serve.http.answers import ChatCompletion

    if trial.engine is None:
        return skipped("it was not started")
    status, (raw,) = _asked(trial, _CHAT)
    if status != 200:
        return failed(f"HTTP {status}", "answer what OpenAI's API documents")
    try:
        answer = ChatCompletion.model_validate_json(raw)
    except ValidationError as error:
        return failed(f"{error.error_count()} fields are wrong", "answer as OpenAI's API does")
    used = answer.usage
    if used.prompt_tokens < 1 or not 1 <= used.completion_tokens <= _NEW:
        return failed(f"usage is {used}", "count tokens: callers' limits go by them")
    return passed(
        f"{used.completion_tokens} tokens, finish_reason {answer.choices[0].finish_reason}"
    )


def _streams(trial: _Trial) -> Finding:
    from pydantic import ValidationError

    from mst.serve.http.pieces import ChunkPiece

    if trial.engine is None:
        return skipped("it was not started")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    status, events = _asked(trial, _CHAT | options)
    if status != 200 or len(events) < 2:
        return failed(f"HTTP {status}, {len(events)} events", "stream server-sent events")
    try:
        chunks = [ChunkPiece.model_validate_json(each) for each in events[:-1]]
    except ValidationError as error:
        return failed(f"{error.error_count()} fields are wrong", "stream as OpenAI's API does")
    if chunks[-1].usage is None:
        return failed("the last event has no usage", "keep stream_options.include_usage")
    return passed(f"{len(events)} events, and usage at the end")


def _quiet(trial: _Trial) -> Finding:
    if not trial.words:
        return skipped("it was not started")
    time.sleep(0.5)  # what is logged after an answer
    if any(_MARK.encode() in each.written for each in trial.words):
        return failed("it wrote the prompt to its output", "switch its logging of requests off")
    return passed("the prompt is not in its output")


def _ends(trial: _Trial) -> Finding:
    if trial.engine is None or trial.engine.pid is None:
        return skipped("it was not started")
    pid, began = trial.engine.pid, time.monotonic()
    trial.engine.close()
    seconds = time.monotonic() - began
    if Path(f"/proc/{pid}").exists() or seconds > _END_SECONDS:
        return failed(f"it ran on for {seconds:.1f} s", "end on SIGTERM")
    return passed(f"ended {seconds:.1f} s after SIGTERM")


# Id, promise, and how it is tried; in the order of a server's life.
CHECKS: tuple[tuple[str, str, Callable[[_Trial], Finding]], ...] = (
    ("engine.loads", "the plugin loads, with the hooks of a serving engine", _loads),
    ("engine.tells", "facts have their source, and the environment its one command", _tells),
    ("engine.light", "the choice imports no torch", _light),
    ("engine.starts", "it is started in the jail, and answers its health path", _starts),
    ("engine.answers", "it answers a conversation in OpenAI's shape, tokens counted", _answers),
    ("engine.streams", "it streams in OpenAI's shape, with usage at the end", _streams),
    ("engine.quiet", "it writes no prompt to its output", _quiet),
    ("engine.ends", "it ends when it is told to", _ends),
)
_NEEDED = ("engine.loads", "engine.tells", "engine.starts")


def run_checks(
    name: str, workspace: Path, directory: str | None = None, model: str | None = None
) -> list[Result]:
    """Return the results of all checks of a serving engine, run in a process of their own.

    Args:
        name: as users write it after `--engine`.
        workspace: an empty directory.
        directory: of its environment; None for the usual place.
        model: directory of a model to start it on; None for a tiny one with random weights.

    Raises:
        UsageError: no engine and no plugin has that name.
    """
    registry = load()
    if name not in registry.engines and all(each.name != name for each in registry.records):
        raise UsageError(
            f"no serving engine {name!r} is installed here (installed:"
            f" {', '.join(sorted(registry.engines)) or 'none'}). `mst plugins` lists every plugin."
        )
    lines = workspace / "results.jsonl"
    arguments = (name, str(workspace), str(lines), directory or "", model or "")
    module = "mst.conformance.serving_engine"
    return results_of(module, arguments, lines, CHECKS, SECONDS, "mend it")


def main(argv: Sequence[str]) -> int:
    """Run the checks and write their results."""
    name, workspace, lines = argv[0], Path(argv[1]), Path(argv[2])
    trial = _Trial(name, workspace, argv[3], argv[4])
    with asking(JailRequest(), Scene(outputs=(str(workspace),))):
        try:
            write_results(CHECKS, trial, _NEEDED, lines)
        finally:
            if trial.engine is not None:
                trial.engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
