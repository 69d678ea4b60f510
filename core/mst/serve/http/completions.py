"""POST /v1/completions: text that goes on from a text, without a chat template."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from typing import Literal

from mst.serve.engine import Token
from mst.serve.http.answers import Completion, CompletionChoice, CompletionLogprobs, plain
from mst.serve.http.generation import Asked
from mst.serve.http.prompts import plain_ids
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
from mst.serve.http.token_text import logprob_of
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
    most = request.max_tokens or COMPLETION_TOKENS
    choice = choice_of(service, request, most, request.logprobs)
    prompts = [
        each for one in ids for each in prompts_of(service, exchange, request, one, choice, adapter)
    ]
    echoes = [""] * len(prompts)
    if request.echo:
        texts = [
            each if isinstance(each, str) else service.reader.tokenizer.decode(each)
            for each in given
        ]
        echoes = [text for text in texts for _ in range(request.n or 1)]
    tokenizer = service.reader.tokenizer.tokenizer
    answers = [_Answer(Decoder(tokenizer), Held(request.stops)) for _ in prompts]
    sent = _Sent(request, exchange)
    if request.stream:
        sent.events = exchange.events = Events(exchange)
    async with Asked(service.engine, prompts) as asked:
        for index, echo in enumerate(echoes):
            if echo:
                await sent.piece(index, answers[index], echo)
        async for index, token in asked:
            answer = answers[index]
            count(exchange, token, first=answer.tokens == 0)
            ends = token.finish == "stop" and token.id in choice.stop_ids
            at = answer.length
            shown = answer.push(token, ends)
            if not ends:
                _note(service, answer, token, at)
            if shown or answer.finish is not None:
                await sent.piece(index, answer, shown)
            if answer.finish is not None:
                asked.stop(index)
    await sent.end(answers)


def _note(service: Service, answer: _Answer, token: Token, at: int) -> None:
    found = logprob_of(service.reader.tokenizer.tokenizer, token)
    if found is None:
        return
    if answer.logprobs is None:
        answer.logprobs = CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]
        )
    answer.logprobs.tokens.append(found.token)
    answer.logprobs.token_logprobs.append(found.logprob)
    answer.logprobs.top_logprobs.append({each.token: each.logprob for each in found.top_logprobs})
    answer.logprobs.text_offset.append(at)


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
