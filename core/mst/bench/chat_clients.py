"""Clients that stream chat completions over HTTP from one thread, so that they cost little."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

# An answer that takes longer is lost.
PATIENCE_SECONDS = 3600.0
# The least bias of OpenAI's API, which bans a token.
_NEVER = -100
# What may go wrong on the way: the connection, its end, or bytes that are no answer's.
# On Python 3.10 asyncio's TimeoutError is no OSError.
_LOST = (OSError, EOFError, ValueError, LookupError, TypeError, asyncio.TimeoutError)


@dataclass(frozen=True)
class Question:
    """What is asked of a model.

    Attributes:
        messages: the conversation.
        tokens: longest answer.
        never: ids of tokens that the answer must not have, such as those that would end it.
    """

    messages: list[dict[str, str]] = field(repr=False)
    tokens: int
    never: tuple[int, ...] = ()


@dataclass
class Answer:
    """What came of a question.

    Attributes:
        question: that was asked.
        text: of the answer.
        tokens: of the answer, as the server counts them.
        prompt_tokens: that the model read.
        cached_tokens: of these, what the server had kept.
        first_token_seconds: from the first byte sent to the first text received; None if none came.
        fault: why it is lost; "" where it came whole.
    """

    question: Question
    text: str = field(default="", repr=False)
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_seconds: float | None = None
    fault: str = ""


def events(received: bytes) -> tuple[list[str], bytes]:
    """Return the data of the whole lines of an event stream, and the line that has only begun."""
    *lines, rest = received.split(b"\n")
    return [each[5:].strip().decode() for each in lines if each.startswith(b"data:")], rest


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is at least so large as a share of all (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


async def ask(
    port: int, model: str, question: Question, usage: bool, patience: float = PATIENCE_SECONDS
) -> Answer:
    """Ask on 127.0.0.1 and read the answer as it comes; what goes wrong is its fault.

    Args:
        port: of the server.
        model: by its name there.
        question: to ask.
        usage: ask for the number of tokens; `transformers serve` tells it unasked, and refuses a
            request that asks.
        patience: seconds after which the answer is lost.
    """
    body: dict[str, Any] = {
        "model": model, "messages": question.messages, "max_tokens": question.tokens,
        "temperature": 0, "stream": True,
    }  # fmt: skip
    if question.never:
        body["logit_bias"] = {str(each): _NEVER for each in question.never}
    if usage:
        body["stream_options"] = {"include_usage": True}
    answer = Answer(question)
    try:
        exchange = _exchange(port, json.dumps(body).encode(), answer)
        await asyncio.wait_for(exchange, patience)
    except _LOST as error:
        # Its kind alone: the text of an error may quote the answer.
        answer.fault = type(error).__name__
    return answer


async def _exchange(port: int, body: bytes, answer: Answer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        "Content-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    try:
        begun = time.perf_counter()
        writer.write(head.encode() + body)
        status, chunked = _status(await reader.readuntil(b"\r\n\r\n"))
        if status != 200:
            answer.fault = f"HTTP {status}"
            return
        rest, finished = b"", False
        async for block in _blocks(reader, chunked):
            told, rest = events(rest + block)
            for each in told:
                finished |= each != "[DONE]" and _take(json.loads(each), answer, begun)
        if not finished:
            answer.fault = answer.fault or "cut short"
    finally:
        writer.close()


def _status(head: bytes) -> tuple[int, bool]:
    lines = head.decode("latin-1").lower().split("\r\n")
    return int(lines[0].split()[1]), "transfer-encoding: chunked" in lines


async def _blocks(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """Yield the bytes of a body as they come (RFC 9112, section 7.1)."""
    if not chunked:
        while block := await reader.read(1 << 16):
            yield block
        return
    while size := int((await reader.readline()).partition(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


def _take(event: dict[str, Any], answer: Answer, begun: float) -> bool:
    """Add an event to an answer; return whether it says that the answer is finished."""
    if "error" in event:
        answer.fault = "an error in the stream"
    figures = event.get("usage")
    if figures:
        answer.tokens, answer.prompt_tokens = figures["completion_tokens"], figures["prompt_tokens"]
        answer.cached_tokens = (figures.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    finished = False
    for choice in event.get("choices", ()):
        piece = choice["delta"].get("content")
        if piece and answer.first_token_seconds is None:
            answer.first_token_seconds = time.perf_counter() - begun
        answer.text += piece or ""
        finished |= choice.get("finish_reason") is not None
    return finished


def ask_together(
    port: int,
    model: str,
    streams: Sequence[Sequence[Question]],
    usage: bool,
    told: Callable[[], None] = lambda: None,
    patience: float = PATIENCE_SECONDS,
) -> tuple[list[list[Answer]], float]:
    """Ask the questions of each stream one after the other, and all streams at once.

    Args:
        port: of the server.
        model: by its name there.
        streams: the questions of each.
        usage: as `ask` takes it.
        told: is called after each answer.
        patience: seconds after which an answer is lost.

    Returns:
        The answers of each stream, and the seconds that all took.
    """

    async def one(questions: Sequence[Question]) -> list[Answer]:
        answers = []
        for each in questions:
            answers.append(await ask(port, model, each, usage, patience))
            told()
        return answers

    async def all_of_them() -> list[list[Answer]]:
        return await asyncio.gather(*(one(each) for each in streams))

    begun = time.perf_counter()
    answers = asyncio.run(all_of_them())
    return answers, time.perf_counter() - begun
