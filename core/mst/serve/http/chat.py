"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mst.serve.engine import Choice, Prompt, SchemaRefused, Token
from mst.serve.http.answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    FunctionCall,
    TokenLogprob,
    ToolCall,
    plain,
)
from mst.serve.http.generation import Asked
from mst.serve.http.prompts import chat_ids
from mst.serve.http.refusals import wrong
from mst.serve.http.service import (
    Service,
    choice_of,
    chosen,
    count,
    count_prompts,
    prompts_of,
    usage,
)
from mst.serve.http.shapes import ChatRequest, NamedTool
from mst.serve.http.texts import Decoder, Held
from mst.serve.http.token_text import logprob_of
from mst.serve.http.tool_calls import FoundCall, Watch, schema_of
from mst.serve.http.wire import Events, Exchange, answer_json, dumped

# A model that is held to JSON may write white space for ever, where nothing forbids it: what
# indented JSON needs is allowed, and no more. llguidance reads it from the schema itself.
_SPACES = r"\n {0,20}| ?"
Finish = Literal["stop", "length", "tool_calls"]


@dataclass
class _Answer:
    """One answer while it comes."""

    decoder: Decoder
    held: Held
    watch: Watch | None
    names: frozenset[str]
    one_call: bool = False
    calls: tuple[FoundCall, ...] = ()
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    tokens: int = 0

    def push(self, token: Token, ends: bool) -> str:
        """Take a token, and return what may be shown; `finish` is set with the last.

        Args:
            token: that came.
            ends: it is one that stops, and has no text.
        """
        self.tokens += 1
        shown = "" if ends else self._show(self.held.push(self.decoder.push(token.id)))
        if self.held.found is not None:
            return shown + self._end("stop")
        if token.finish is not None:
            return shown + self._show(self.held.rest()) + self._end(token.finish)
        return shown

    def _show(self, text: str) -> str:
        return text if self.watch is None else self.watch.push(text)

    def _end(self, finish: Literal["stop", "length"]) -> str:
        rest = ""
        if self.watch is not None:
            rest, calls = self.watch.end(self.names)
            self.calls = calls[:1] if self.one_call else calls
        self.finish = "tool_calls" if self.calls else finish
        return rest


async def chat(service: Service, exchange: Exchange, request: ChatRequest) -> None:
    """Answer a conversation, at once or as it comes.

    Raises:
        Refusal: it can't be answered.
        MstError: the engine refuses or fails.
    """
    adapter = chosen(service, exchange, request.model)
    # A template may take a second for a long conversation, and others wait for this thread.
    ids = await asyncio.to_thread(chat_ids, service.reader, request)
    count_prompts(exchange, [ids])
    prompts = prompts_of(service, exchange, request, ids, _choice(service, request), adapter)
    try:
        if request.stream:
            await _stream(service, exchange, request, prompts)
        else:
            await _whole(service, exchange, request, prompts)
    except SchemaRefused as error:
        raise wrong(str(error), _held_by(request)) from None


def _held_by(request: ChatRequest) -> str:
    """Return the field whose schema an answer is held to, if it is held to any."""
    forced = isinstance(request.tool_choice, NamedTool) or request.tool_choice == "required"
    return "tools" if request.tools and forced else "response_format"


def _choice(service: Service, request: ChatRequest) -> Choice:
    most = request.max_completion_tokens or request.max_tokens or service.most_tokens
    top = (request.top_logprobs or 0) if request.logprobs else None
    return replace(choice_of(service, request, most, top), json_schema=_schema(request))


def _schema(request: ChatRequest) -> str | None:
    """Return what an answer is held to; None for nothing."""
    wanted, tool = request.response_format, request.tool_choice
    schema: Mapping[str, Any] | None = None
    if request.tools and isinstance(tool, NamedTool):
        schema = schema_of(request.tools, tool.function.name)
    elif request.tools and tool == "required":
        schema = schema_of(request.tools)
    elif wanted is not None and wanted.type != "text":
        schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
    if schema is None:
        return None
    try:
        return json.dumps(
            {"x-guidance": {"whitespace_pattern": _SPACES}, **schema}, allow_nan=False
        )
    except (ValueError, RecursionError):
        raise wrong(
            "a schema has a number that JSON does not have, or is too deep.", _held_by(request)
        ) from None


def _answers(service: Service, request: ChatRequest) -> list[_Answer]:
    tools = request.tools if request.tool_choice != "none" else None
    names = frozenset(each.function.name for each in tools or ())
    tokenizer = service.reader.tokenizer.tokenizer
    return [
        _Answer(
            Decoder(tokenizer),
            Held(request.stops),
            Watch() if names else None,
            names,
            one_call=request.parallel_tool_calls is False,
        )
        for _ in range(request.n or 1)
    ]


def _take(
    service: Service, exchange: Exchange, answer: _Answer, token: Token
) -> tuple[str, TokenLogprob | None]:
    """Count a token, and return what it shows."""
    count(exchange, token, first=answer.tokens == 0)
    ends = token.finish == "stop" and token.id in service.reader.tokenizer.eos_token_ids
    found = None if ends else logprob_of(service.reader.tokenizer.tokenizer, token)
    return answer.push(token, ends), found


async def _whole(
    service: Service, exchange: Exchange, request: ChatRequest, prompts: list[Prompt]
) -> None:
    answers = _answers(service, request)
    pieces: list[list[str]] = [[] for _ in answers]
    async with Asked(service.engine, prompts) as asked:
        async for index, token in asked:
            answer = answers[index]
            shown, found = _take(service, exchange, answer, token)
            pieces[index].append(shown)
            if found is not None:
                answer.logprobs.append(found)
            if answer.finish is not None:
                asked.stop(index)
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(
                content="".join(pieces[index]) or (None if each.calls else ""),
                tool_calls=_calls(each.calls, numbered=False) or None,
            ),
            logprobs=ChatLogprobs(content=each.logprobs) if request.logprobs else None,
            finish_reason=each.finish or "length",
        )
        for index, each in enumerate(answers)
    ]
    whole = ChatCompletion(
        id=_identity(),
        created=int(time.time()),
        model=request.model,
        choices=choices,
        usage=usage(exchange),
    )
    await answer_json(exchange, plain(whole))


def _identity() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"


def _calls(calls: tuple[FoundCall, ...], numbered: bool) -> list[ToolCall]:
    return [
        ToolCall(
            index=number if numbered else None,
            id=each.id,
            function=FunctionCall(name=each.name, arguments=each.arguments),
        )
        for number, each in enumerate(calls)
    ]


async def _stream(
    service: Service, exchange: Exchange, request: ChatRequest, prompts: list[Prompt]
) -> None:
    answers = _answers(service, request)
    events, identity, created = Events(exchange), _identity(), int(time.time())
    exchange.events = events

    async def send(*choices: ChatChunkChoice, figures: bool = False) -> None:
        chunk = ChatChunk(
            id=identity,
            created=created,
            model=request.model,
            choices=list(choices),
            usage=usage(exchange) if figures else None,
        )
        await events.send(plain(chunk))

    head = _head(identity, created, request.model)
    async with Asked(service.engine, prompts) as asked:
        for index in range(len(answers)):
            delta = Delta(role="assistant", content="")
            await send(ChatChunkChoice(index=index, delta=delta))
        async for index, token in asked:
            answer = answers[index]
            shown, found = _take(service, exchange, answer, token)
            if found is not None:
                answer.logprobs.append(found)
            if shown and not request.logprobs:
                await events.send_json(_piece(head, index, shown))
            elif shown:
                logprobs, answer.logprobs = ChatLogprobs(content=answer.logprobs), []
                delta = Delta(content=shown)
                await send(ChatChunkChoice(index=index, delta=delta, logprobs=logprobs))
            if answer.finish is not None:
                asked.stop(index)
                if answer.calls:
                    delta = Delta(tool_calls=_calls(answer.calls, numbered=True))
                    await send(ChatChunkChoice(index=index, delta=delta))
                left = ChatLogprobs(content=answer.logprobs) if answer.logprobs else None
                await send(
                    ChatChunkChoice(
                        index=index, delta=Delta(), logprobs=left, finish_reason=answer.finish
                    )
                )
    if request.wants_usage:
        await send(figures=True)
    await events.end()


def _head(identity: str, created: int, model: str) -> str:
    """Return the JSON with which all pieces of a stream begin."""
    chunk = ChatChunk(id=identity, created=created, model=model, choices=[])
    return dumped(plain(chunk)).removesuffix("]}")


def _piece(head: str, index: int, text: str) -> str:
    """Return the JSON of a piece that is text alone, as a `ChatChunk` would be.

    There is one for each token, and what its making takes, the model waits for.
    """
    return (
        f'{head}{{"index":{index},"delta":{{"content":{dumped(text)}}},"logprobs":null,'
        '"finish_reason":null}]}'
    )
