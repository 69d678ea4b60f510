"""POST /v1/completions: text that goes on from a text, without a chat template."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from typing import Literal

from mst.serve.engine import Scoring, Token
from mst.serve.http.answers import Completion, CompletionChoice, CompletionLogprobs, plain
from mst.serve.http.generation import Asked
from mst.serve.http.prompts import plain_ids
from mst.serve.http.refusals import wrong
from mst.serve.http.service import (
    COMPLETION_TOKENS,
    Service,
    choice_of,
    chosen,
    count,
    count_prompts,
    prompts_of,
    usage,
)
from mst.serve.http.shapes import CompletionRequest
from mst.serve.http.texts import Decoder, Held
from mst.serve.http.token_text import finite, likeliest, token_text
from mst.serve.http.wire import Events, Exchange, answer_json


@dataclass
class _Answer:
    """One text while it comes."""

    decoder: Decoder
    held: Held
    length: int = 0
    finish: Literal["stop", "length"] | None = None
    tokens: int = 0
    pieces: list[str] = field(default_factory=list)
    logprobs: CompletionLogprobs | None = None

    def push(self, token: Token, ends: bool) -> str:
        self.tokens += 1
        shown = "" if ends else self.held.push(self.decoder.push(token.id))
        if self.held.found is not None:
            self.finish = "stop"
        elif token.finish is not None:
            shown, self.finish = shown + self.held.rest(), token.finish
        self.length += len(shown)
        return shown


async def completions(service: Service, exchange: Exchange, request: CompletionRequest) -> None:
    """Go on from each prompt, at once or as it comes.

    Raises:
        Refusal: it can't be answered.
        MstError: the engine refuses or fails.
    """
    adapter = chosen(service, exchange, request.model)
    given = request.prompts()
    ids = await asyncio.to_thread(
        lambda: [plain_ids(service.reader, each, "prompt") for each in given]
    )
    count_prompts(exchange, ids)
    most = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    choice = choice_of(service, request, most, request.logprobs)
    copies = request.n or 1
    prompts = [
        each for one in ids for each in prompts_of(service, exchange, request, one, choice, adapter)
    ]
    tokenizer = service.reader.tokenizer.tokenizer
    answers = [_Answer(Decoder(tokenizer), Held(request.stops)) for _ in prompts]
    scored = request.echo and request.logprobs is not None
    if scored:
        found = await _scores(service, ids, request.logprobs or 0, adapter)
        for index, answer in enumerate(answers):
            answer.logprobs = _of_prompt(service, found[index // copies])
    sent = _Sent(request, exchange)
    if request.stream:
        sent.events = exchange.events = Events(exchange)
    if most == 0:
        prompts = []
        for answer in answers:
            answer.finish = "length"
    async with Asked(service.engine, prompts) as asked:
        for index, answer in enumerate(answers):
            if request.echo:
                echo = _text(service, given[index // copies])
                answer.length = len(echo)
                await sent.piece(index, answer, echo)
        async for index, token in asked:
            answer = answers[index]
            count(exchange, token, first=answer.tokens == 0)
            ends = token.finish == "stop" and token.id in choice.stop_ids
            at = answer.length
            shown = answer.push(token, ends)
            # Behind a prompt's tokens there is one for each that was written: harnesses that
            # measure how likely prompts are ask for one, and take the last away.
            if scored or not ends:
                _note(service, answer, token, at)
            if shown or answer.finish is not None:
                await sent.piece(index, answer, shown)
            if answer.finish is not None:
                asked.stop(index)
    await sent.end(answers)


def _text(service: Service, given: str | list[int]) -> str:
    return given if isinstance(given, str) else service.reader.tokenizer.decode(given)


async def _scores(
    service: Service, ids: list[tuple[int, ...]], top: int, adapter: str | None
) -> list[list[Token]]:
    """Return each prompt's tokens with their log-probabilities.

    Raises:
        Refusal: this engine has none.
        MstError: it fails.
    """
    engine = service.engine
    if not isinstance(engine, Scoring):
        raise wrong(
            "the engine that is served with does not tell how likely prompts are. Leave echo or"
            " logprobs out.",
            "echo",
        )
    found: list[list[Token]] = []
    # One at a time: a caller who goes away ends it.
    async with service.reading:
        for each in ids:
            found += await asyncio.to_thread(engine.score, [each], top, adapter)
    return found


def _none() -> CompletionLogprobs:
    return CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])


def _of_prompt(service: Service, scored: list[Token]) -> CompletionLogprobs:
    """Return what is told of a prompt's tokens."""
    found, decoder, length = _none(), Decoder(service.reader.tokenizer.tokenizer), 0
    for token in scored:
        _add(service, found, token, length)
        length += len(decoder.push(token.id))
    return found


def _note(service: Service, answer: _Answer, token: Token, at: int) -> None:
    if token.logprob is not None:
        if answer.logprobs is None:
            answer.logprobs = _none()
        _add(service, answer.logprobs, token, at)


def _add(service: Service, found: CompletionLogprobs, token: Token, at: int) -> None:
    tokenizer = service.reader.tokenizer.tokenizer
    found.tokens.append(token_text(tokenizer, token.id))
    found.token_logprobs.append(None if token.logprob is None else finite(token.logprob))
    found.top_logprobs.append(likeliest(tokenizer, token))
    found.text_offset.append(at)


class _Sent:
    """Texts as they go out: in pieces, or kept for the end."""

    def __init__(self, request: CompletionRequest, exchange: Exchange) -> None:
        self.events: Events | None = None
        self._request, self._exchange = request, exchange
        self._identity = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    async def piece(self, index: int, answer: _Answer, text: str) -> None:
        if self.events is None:
            answer.pieces.append(text)
            return
        logprobs, answer.logprobs = answer.logprobs, None
        choice = CompletionChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=answer.finish
        )
        await self.events.send(plain(self._completion([choice], figures=False)))

    async def end(self, answers: list[_Answer]) -> None:
        if self.events is not None:
            if self._request.wants_usage:
                await self.events.send(plain(self._completion([], figures=True)))
            await self.events.end()
            return
        choices = [
            CompletionChoice(
                index=index,
                text="".join(each.pieces),
                logprobs=each.logprobs,
                finish_reason=each.finish,
            )
            for index, each in enumerate(answers)
        ]
        await answer_json(self._exchange, plain(self._completion(choices, figures=True)))

    def _completion(self, choices: list[CompletionChoice], figures: bool) -> Completion:
        return Completion(
            id=self._identity,
            created=self._created,
            model=self._request.model,
            choices=choices,
            usage=usage(self._exchange) if figures else None,
        )
