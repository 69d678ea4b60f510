"""What is made of a cell's run: exports with their gate's figures, and servers under load."""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mst.bench.chat_clients import Answer, Question, ask_together, percentile
from mst.bench.process import error_in, mst_command, run_watched, started
from mst.bench.results import Exported, Served
from mst.errors import MstError
from mst.training.sealed_directory import MANIFEST

if TYPE_CHECKING:
    from mst.bench.cells import Cell
    from mst.bench.run_cell import Place

_REQUESTS_A_STREAM = 2
_MODEL, _TOKENIZER = "model", "tokenizer.json"
# Plain words, one or two tokens each in any vocabulary; what is asked does not matter.
_WORDS = (
    "river", "stone", "table", "window", "garden", "paper", "bridge", "music", "winter", "letter",
    "market", "silver", "forest", "morning", "harbour", "kitchen", "number", "village", "doctor",
    "engine", "island", "butter", "season", "mirror", "shadow",
)  # fmt: skip


class ServerFailed(Exception):
    """A server does not answer; its text says why."""


def export_run(
    cell: Cell, place: Place, run: Path, name: str, output: Path
) -> tuple[Exported, Path]:
    """Return what came of exporting a run in one format, and the artefact's directory.

    Each format merges for itself, so that its seconds don't depend on those before it.
    """
    command = mst_command(
        "export", str(run), "--format", name, "--output-dir", str(output), *place.seal
    )
    log = output.with_name(f"{output.name}.log")
    ended = run_watched(command, log, place.environ, cell.procedure.timeout_seconds)
    artefact = output / name
    seconds = round(ended.seconds, 3)
    try:
        manifest = json.loads((artefact / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        late = f"ended after {ended.seconds:.0f} s" if ended.late else ""
        reason = late or ended.message or f"mst export ended with code {ended.code}"
        return Exported(name, "error", reason, seconds), artefact
    model = (manifest.get("quality") or {}).get("model") or {}
    made = Exported(
        format=name,
        status=manifest["status"],
        reason="; ".join(manifest["faults"]),
        seconds=seconds,
        disk_bytes=sum(each["bytes"] for each in manifest["files"].values()),
        perplexity_ratio=model.get("perplexity_ratio"),
        mean_kl=model.get("mean_kl"),
        agreement=model.get("agreement"),
    )
    return made, artefact


def serve_target(cell: Cell, place: Place, target: Path, name: str, log: Path) -> list[Served]:
    """Return what `mst serve` gave at each number of streams; one server for all of them.

    Every answer is as long as the cell asks for: a model that was tuned for a few steps ends most
    of its answers at once, and a server of such answers has no speed.
    """
    try:
        never = _end_tokens(target)
        with _server(cell, place, target, log.with_suffix(".log")) as port:
            # Kernels are chosen and caches made with the first answers.
            if _refused(_warmed_up(cell, port, never)):  # not every engine takes a bias
                never = ()
                _warmed_up(cell, port, never)
            return [_under_load(cell, port, name, each, never) for each in cell.procedure.serving]
    except (ServerFailed, MstError) as error:
        return [Served(name, streams, reason=str(error)) for streams in cell.procedure.serving]


def _end_tokens(target: Path) -> tuple[int, ...]:
    """Return the tokens that end an answer of a run or an export; none of a file without them.

    Raises:
        MstError: they can't be read.
    """
    from mst import rundir
    from mst.data.tokens import load_tokenizer

    directory = target
    if (target / rundir.MANIFEST).is_file():
        directory = Path(rundir.read_manifest(target).model_path)
    return load_tokenizer(directory).eos_token_ids if (directory / _TOKENIZER).is_file() else ()


def _warmed_up(cell: Cell, port: int, never: tuple[int, ...]) -> list[Answer]:
    warm = [[_question(cell, "warm up", never)]] * 2
    told, _ = ask_together(port, _MODEL, warm, usage=True, patience=cell.procedure.timeout_seconds)
    return [each for stream in told for each in stream]


def _refused(answers: Sequence[Answer]) -> bool:
    return any(each.fault == "HTTP 400" for each in answers)


def _under_load(cell: Cell, port: int, name: str, streams: int, never: tuple[int, ...]) -> Served:
    asked = [
        [_question(cell, f"{streams}/{stream}/{turn}", never) for turn in range(_REQUESTS_A_STREAM)]
        for stream in range(streams)
    ]
    patience = cell.procedure.timeout_seconds
    told, seconds = ask_together(port, _MODEL, asked, usage=True, patience=patience)
    return served_of(name, streams, [each for stream in told for each in stream], seconds)


def served_of(name: str, streams: int, answers: Sequence[Answer], seconds: float) -> Served:
    """Return the figures of a load; answers that are lost or too short are told of.

    Args:
        name: of what was served.
        streams: that asked.
        answers: of all of them.
        seconds: that all took together.
    """
    whole = [each for each in answers if not each.fault]
    notes = sorted({each.fault for each in answers if each.fault})
    short = [each for each in whole if each.tokens < each.question.tokens]
    if short:
        notes.append(f"{len(short)} of {len(whole)} answers were shorter than what was asked for")
    waits = [each.first_token_seconds for each in whole if each.first_token_seconds is not None]
    tokens = sum(each.tokens for each in whole)
    return Served(
        target=name,
        streams=streams,
        reason=", ".join(notes),
        requests=len(answers),
        lost=len(answers) - len(whole),
        answer_tokens=tokens,
        tokens_per_second=round(tokens / seconds, 3) if whole else None,
        first_token_seconds=round(statistics.median(waits), 4) if waits else None,
        first_token_p95_seconds=round(percentile(waits, 0.95), 4) if waits else None,
    )


def _question(cell: Cell, seed: str, never: tuple[int, ...]) -> Question:
    """Return a question of the cell's length, the same for each seed."""
    how = cell.procedure
    draw = random.Random(f"mst:bench:{how.seed}:{seed}")
    words = " ".join(draw.choices(_WORDS, k=how.prompt_words))
    text = f"Write a long story with these words: {words}"
    return Question([{"role": "user", "content": text}], how.answer_tokens, never)


@contextmanager
def _server(cell: Cell, place: Place, target: Path, log: Path) -> Iterator[int]:
    """Serve a target and yield the port, until left.

    Raises:
        ServerFailed: it does not start.
    """
    command = mst_command(
        "serve", str(target), "--served-name", _MODEL, "--device", cell.device, "--port", "0",
        "--access-log", "off", *place.seal,
    )  # fmt: skip
    printed = log.with_suffix(".out")
    with started(command, log, printed, place.environ) as process:
        yield _port(process, printed, log, cell.procedure.timeout_seconds)


def _port(process: subprocess.Popen[bytes], printed: Path, log: Path, timeout: float) -> int:
    until = time.monotonic() + timeout
    while True:
        said = printed.read_text(encoding="utf-8", errors="replace")
        if "\nready " in said:
            found = re.search(r"^serve .* at http://127\.0\.0\.1:(\d+)/", said, re.MULTILINE)
            if found is None:
                raise ServerFailed("mst serve names no port")
            return int(found[1])
        if process.poll() is not None:
            kind, message = error_in(log.read_text(encoding="utf-8", errors="replace"))
            raise ServerFailed(f"{kind}: {message}" if kind else message or "mst serve has ended")
        if time.monotonic() > until:
            raise ServerFailed(f"mst serve was not ready after {timeout:.0f} s")
        time.sleep(0.1)
