"""The benchmark beside another server: what it reads, counts and calls a wrong answer."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.greedy_answers import near_ties
from benchmarks.serve_throughput import Measured, medians, question, ratios, words_of
from benchmarks.server_process import descendants, peak_rss_bytes, processes, pss_watched, rss_bytes

from mst.bench.chat_clients import Answer, Question, ask_together, events, percentile
from mst.chat import Sampling
from mst.data.tokens import TextTokenizer, load_tokenizer
from mst.generate import generate

HELLO = Question([{"role": "user", "content": "my card is late"}], 9)
STREAM = (
    b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
    b'data: {"choices": [{"delta": {"content": "Gr\xc3\xbc"}}]}\n\n'
    b'data: {"choices": [{"delta": {"content": "\xc3\x9fe"}}]}\n\n'
    b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"completion_tokens": 9, "prompt_tokens": 30,'
    b' "prompt_tokens_details": {"cached_tokens": 20}}}\n\ndata: [DONE]\n\n'
)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_events_are_read_as_their_lines_become_whole() -> None:
    first, rest = events(b'data: {"a": 1}\r\n\r\n: a comment\ndata: {"b"')
    second, left = events(rest + b": 2}\n\n")

    assert (first, second, left) == (['{"a": 1}'], ['{"b": 2}'], b"")


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.5, 10), (0.95, 19), (0.951, 20), (1.0, 20)]
)
def test_a_percentile_is_one_of_the_values(share: float, expected: int) -> None:
    assert percentile([*range(20, 0, -1)], share) == expected


def chunks(body: bytes, size: int) -> bytes:
    parts = [body[place : place + size] for place in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in parts)


@pytest.fixture
def answering() -> Iterator[Any]:
    """Return a function that starts a server which answers every request with the same bytes."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers: list[asyncio.Server] = []

    def start(raw: bytes) -> int:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.rpartition(b"Content-Length: ")[2]))
            writer.write(raw)
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        begun = asyncio.run_coroutine_threadsafe(asyncio.start_server(answer, "127.0.0.1", 0), loop)
        servers.append(begun.result(10))
        port: int = servers[-1].sockets[0].getsockname()[1]
        return port

    yield start
    for each in servers:
        loop.call_soon_threadsafe(each.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_an_answer_is_read_however_it_is_cut_up(answering: Any, size: int) -> None:
    port = answering(CHUNKED + chunks(STREAM, size) + b"0\r\n\r\n")
    streams, _ = ask_together(port, "model", [[HELLO] * 2] * 3, usage=True)

    assert [len(each) for each in streams] == [2, 2, 2]
    for answer in (each for stream in streams for each in stream):
        assert (answer.fault, answer.text, answer.tokens) == ("", "Grüße", 9)
        assert (answer.prompt_tokens, answer.cached_tokens) == (30, 20)
        assert answer.first_token_seconds is not None


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n", "HTTP 429"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + STREAM[:140], "cut short"),
        (CHUNKED + chunks(STREAM, 50)[:200], "IncompleteReadError"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": "out of memory"}\n\n', "an error in the stream"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: no JSON\n\n", "JSONDecodeError"),
        (b"", "IncompleteReadError"),
    ],
)
def test_an_answer_that_is_not_whole_is_lost(answering: Any, raw: bytes, fault: str) -> None:
    ((answer,),), _ = ask_together(answering(raw), "model", [[HELLO]], usage=False)

    assert answer.fault == fault


def test_questions_have_the_length_that_is_asked_for(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    words = words_of(tiny_model)
    one, same, other = (question(words, seed, 64, 8) for seed in ("a", "a", "b"))

    assert one == same != other
    for each in (one, other):
        assert 48 <= len(tokenizer.encode(each.messages[0]["content"]).ids) <= 80


def load(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    untyped: Any = AutoModelForCausalLM
    return untyped.from_pretrained(model_dir).eval()


def answer_of(model: Any, tokenizer: TextTokenizer, prompt: list[int]) -> list[int]:
    return list(generate(model, prompt, tokenizer.eos_token_ids, Sampling(8)))


def test_only_what_offline_generation_says_is_equal(tiny_model: Path) -> None:
    tokenizer, model = load_tokenizer(tiny_model), load(tiny_model)
    prompt = tokenizer.encode("my card is late").ids
    text = tokenizer.decode(answer_of(model, tokenizer, prompt))

    assert near_ties(model, tokenizer, prompt, text, 8) == []
    for wrong in (text + "x", "x" + text, text[: len(text) // 2], ""):
        assert near_ties(model, tokenizer, prompt, wrong, 8) is None


def test_a_token_that_is_as_likely_may_come_instead(tiny_model: Path) -> None:
    import torch

    tokenizer, model = load_tokenizer(tiny_model), load(tiny_model)
    prompt = tokenizer.encode("my card is late").ids
    first = answer_of(model, tokenizer, prompt)[0]
    # Of two tokens with one embedding, greedy decoding takes the one with the lower id.
    twin = next(
        each for each in range(first + 1, tokenizer.vocab_size)
        if tokenizer.decode([each]).strip().isalpha()
    )  # fmt: skip
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[twin] = weight[first]
    ids = answer_of(model, tokenizer, prompt)
    turned = [twin if each == first else each for each in ids]

    assert ids[0] == first
    ties = near_ties(model, tokenizer, prompt, tokenizer.decode(turned), 8)
    assert ties is not None
    assert len(ties) == ids.count(first)
    assert max(ties) < 4


def test_memory_is_that_of_all_processes_below_one() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input(1)'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"1"
        found = descendants(process.pid)
        rss, peak = rss_bytes(process.pid), peak_rss_bytes(process.pid)
        below = rss_bytes(found[-1])
        process.communicate(b"\n")

    assert len(found) == 2
    assert 1 << 20 < below < rss <= peak
    assert rss_bytes(process.pid) == 0
    assert os.getpid() not in found


def test_the_most_memory_at_one_time_is_seen() -> None:
    code = (
        "input(); held = bytearray(b'x') * (64 << 20); print(flush=True); input(); del held"
        "; print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with pss_watched(process.pid, 0.02) as seen:
            for _ in range(2):
                process.stdin.write(b"\n")
                process.stdin.flush()
                process.stdout.readline()
                count = len(seen)
                while len(seen) < count + 2:
                    time.sleep(0.01)
        process.communicate(b"\n")

    assert max(seen) > seen[0] + (60 << 20)
    assert seen[-1] < max(seen) - (60 << 20)


def test_memory_is_also_that_of_a_fork_that_has_left_its_parent() -> None:
    code = (
        "import os\nreading, writing = os.pipe()\nif os.fork() == 0:\n"
        "    if os.fork() == 0:\n        os.setsid()\n"
        "        os.write(writing, b'%d' % os.getpid())\n        input()\n    os._exit(0)\n"
        "os.wait()\nprint(os.read(reading, 9).decode(), flush=True)\ninput()"
    )
    command = [sys.executable, "-c", code, "a server's directory"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        broker = int(process.stdout.readline())
        below, found = descendants(process.pid), processes(process.pid)
        own, whole = resident_bytes(process.pid), rss_bytes(process.pid)
        process.communicate(b"\n\n")

    assert below == [process.pid]
    assert found == [process.pid, broker]
    assert whole > own > 1 << 20


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_ratios_are_medians_over_rounds() -> None:
    def one(speed: float, text: str) -> Measured:
        return Measured({"tokens_per_second": speed, "lost": 0}, [Answer(HELLO, text)])

    ours = [one(20, "a"), one(30, "b"), one(90, "c")]
    theirs = [one(10, "a"), one(10, "x"), one(10, "c")]

    assert medians([each.figures for each in ours]) == {"tokens_per_second": 30, "lost": 0}
    assert ratios(ours, theirs) == {"tokens_per_second": 3, "same_answers": 0.6667}
