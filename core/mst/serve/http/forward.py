"""Handing requests on to an engine beside the built-in one, and its answers back.

A request is checked here as for the built-in engine, and made anew of what was checked: nothing
that a caller has sent reaches the engine as it came. An answer is made anew of the fields that this
server documents. What the engine says of a request that it refuses may quote it, so it is withheld.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mst.serve.engine import EngineFailure
from mst.serve.engines.external import ExternalEngine
from mst.serve.engines.upstream import Reply, Unreachable, asked
from mst.serve.http.answers import ChatCompletion, Completion, Embeddings, Usage, plain
from mst.serve.http.pieces import ChunkPiece
from mst.serve.http.prompts import chat_ids, plain_ids
from mst.serve.http.refusals import Refusal, too_many, wrong
from mst.serve.http.service import COMPLETION_TOKENS, Service, chosen, count_prompts
from mst.serve.http.shapes import ChatMessage, ChatRequest, CompletionRequest, EmbeddingRequest
from mst.serve.http.wire import Events, Exchange, answer_json

T = TypeVar("T", bound=BaseModel)
_SAMPLING = ("seed", "n", "stop")
_PENALTIES = ("presence_penalty", "frequency_penalty", "logit_bias")
_RULES: tuple[str, ...] = ("response_format", "tools", "tool_choice", "parallel_tool_calls")
_BUSY_SECONDS, _RESTART_SECONDS = 2, 5


async def chat(service: Service, exchange: Exchange, request: ChatRequest) -> None:
    """Hand a conversation on.

    Raises:
        Refusal: it can't be answered.
        EngineFailure: the engine ended, or answers with something else than agreed.
    """
    engine = _engine(service, exchange, request.model)
    if request.tools and request.tool_choice != "none":
        _need(engine, "tools", "tools")
    if request.response_format is not None and request.response_format.type != "text":
        _need(engine, "json_schema", "response_format")
    if request.logprobs:
        _need(engine, "logprobs", "logprobs")
    _need_penalties(engine, request)
    # The same refusals as of the built-in engine, and the count that limits go by.
    ids = await asyncio.to_thread(chat_ids, service.reader, request)
    count_prompts(exchange, [ids])
    most = request.max_completion_tokens or request.max_tokens or service.most_tokens
    body = _sampled(service, request, most, len(ids))
    system = "developer" not in service.reader.template.source
    body["messages"] = [_message(each, system) for each in request.messages]
    given = {each for each in _RULES if getattr(request, each) is not None}
    body |= request.model_dump(include=given, exclude_none=True, by_alias=True)
    if request.logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    await _handed_on(service, exchange, request, "/v1/chat/completions", body)


async def completions(service: Service, exchange: Exchange, request: CompletionRequest) -> None:
    """Hand a text on, to be gone on from.

    Raises: as `chat`.
    """
    engine = _engine(service, exchange, request.model)
    _need(engine, "completions", None)
    if request.logprobs is not None:
        _need(engine, "logprobs", "logprobs")
    if request.max_tokens == 0 or (request.echo and request.logprobs is not None):
        _need(engine, "prompt_logprobs", "echo")
    _need_penalties(engine, request)
    given = request.prompts()
    ids = await asyncio.to_thread(
        lambda: [plain_ids(service.reader, each, "prompt") for each in given]
    )
    count_prompts(exchange, ids)
    longest = max(map(len, ids))
    body = _sampled(service, request, request.max_tokens or COMPLETION_TOKENS, longest)
    body["prompt"] = request.prompt
    if request.echo:
        body["echo"] = True
    if request.logprobs is not None:
        body["logprobs"] = request.logprobs
    await _handed_on(service, exchange, request, "/v1/completions", body)


async def embeddings(service: Service, exchange: Exchange, request: EmbeddingRequest) -> None:
    """Hand texts on, for their vectors.

    Raises: as `chat`.
    """
    engine = _engine(service, exchange, request.model)
    _need(engine, "embeddings", None)
    given = request.inputs()
    ids = await asyncio.to_thread(
        lambda: [plain_ids(service.reader, each, "input") for each in given]
    )
    count_prompts(exchange, ids)
    body = {"model": request.model, "input": request.input}
    body["encoding_format"] = request.encoding_format or "float"
    async with _asked(engine, exchange, "/v1/embeddings", body) as reply:
        answer = _read(Embeddings, await reply.whole())
    answer.model = request.model
    await answer_json(exchange, plain(answer))


FORWARDED: dict[str, Callable[..., Awaitable[None]]] = {
    "/v1/chat/completions": chat,
    "/v1/completions": completions,
    "/v1/embeddings": embeddings,
}


def _engine(service: Service, exchange: Exchange, model: str) -> ExternalEngine:
    engine = service.external
    assert engine is not None
    chosen(service, exchange, model)
    if engine.supervised.state != "ready":
        raise _restarting(engine)
    return engine


def _restarting(engine: ExternalEngine) -> Refusal:
    return Refusal(
        503,
        f"{engine.job.name} has ended and is started again. Ask again when GET /ready says so.",
        "server_error",
        "engine_restarting",
        headers={"Retry-After": str(_RESTART_SECONDS)},
    )


def _need(engine: ExternalEngine, feature: str, param: str | None) -> None:
    if feature not in engine.job.features:
        raise wrong(
            f"{engine.job.name} has no {feature} as mst starts it."
            f" {'Leave the field out' if param else 'Ask another path'}, or have the model served"
            " with --engine builtin.",
            param,
            "unsupported_by_engine",
        )


def _need_penalties(engine: ExternalEngine, request: ChatRequest | CompletionRequest) -> None:
    for name in _PENALTIES:
        if getattr(request, name):
            _need(engine, "penalties", name)


def _sampled(
    service: Service, request: ChatRequest | CompletionRequest, most: int, tokens: int
) -> dict[str, Any]:
    """Return what all requests for an answer have, with this server's own defaults and limits."""
    room = service.engine.context - tokens
    body: dict[str, Any] = {
        "model": request.model,
        # What an engine takes for its default is often the model's generation_config.json.
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "max_tokens": max(1, min(most, service.most_tokens, room)),
        "stream": bool(request.stream),
    }
    for name in _SAMPLING:
        if getattr(request, name) is not None:
            body[name] = getattr(request, name)
    # One of nothing changes nothing, and an engine may not know it.
    body |= {name: getattr(request, name) for name in _PENALTIES if getattr(request, name)}
    if request.stream:
        body["stream_options"] = {"include_usage": True}
    return body


def _message(message: ChatMessage, system: bool) -> dict[str, Any]:
    role = "system" if system and message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.text()}
    if message.tool_calls:
        found["tool_calls"] = [each.model_dump(exclude={"index"}) for each in message.tool_calls]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    return found


@contextlib.asynccontextmanager
async def _asked(
    engine: ExternalEngine, exchange: Exchange, path: str, body: Mapping[str, Any]
) -> AsyncIterator[Reply]:
    """Ask the engine, and yield an answer that is one; counts it from its begin to its end."""
    raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    engine.count(running=1, prompt_tokens=exchange.prompt_tokens)
    engine.supervised.asked()
    how = "failed"
    try:
        async with asked(engine.supervised.address, path, raw) as reply:
            if reply.status != 200:
                raise await _refused(engine, reply, body)
            yield reply
        how = "finished"
    except asyncio.CancelledError:
        how = "cancelled"
        raise
    except Unreachable:  # its end is not known here yet
        raise _restarting(engine) from None
    finally:
        done = {"running": -1, how: 1, "generated_tokens": exchange.completion_tokens}
        engine.count(**done, cached_tokens=exchange.cached_tokens)


async def _refused(engine: ExternalEngine, reply: Reply, body: Mapping[str, Any]) -> Exception:
    name, status = engine.job.name, reply.status
    if status in (429, 503):
        return too_many(f"{name} is busy.", _BUSY_SECONDS, "overloaded")
    if 400 <= status < 500:
        return wrong(
            f"{name} refused this request (HTTP {status}); its words are withheld, they might quote"
            " it. Look at the field that is named, or leave fields out until it is taken.",
            _param(await reply.whole(), body),
            "refused_by_engine",
        )
    return EngineFailure(f"{name} failed (HTTP {status}). Ask again.")


def _param(raw: bytes, body: Mapping[str, Any]) -> str | None:
    """Return the field that an engine's refusal names, if the request has it."""
    try:
        found = json.loads(raw)["error"]["param"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) and found in body else None


async def _handed_on(
    service: Service,
    exchange: Exchange,
    request: ChatRequest | CompletionRequest,
    path: str,
    body: Mapping[str, Any],
) -> None:
    engine = service.external
    assert engine is not None
    talks = isinstance(request, ChatRequest)
    own = {
        "id": f"{'chatcmpl' if talks else 'cmpl'}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": request.model,
    }
    answer: ChatCompletion | Completion
    async with _asked(engine, exchange, path, body) as reply:
        if request.stream:
            await _stream(exchange, request, reply, ChunkPiece if talks else Completion, own)
            return
        raw = await reply.whole()
        answer = _read(ChatCompletion, raw) if talks else _read(Completion, raw)
        _count(exchange, answer.usage)
    await answer_json(exchange, plain(answer.model_copy(update=own)))


async def _stream(
    exchange: Exchange,
    request: ChatRequest | CompletionRequest,
    reply: Reply,
    kind: type[ChunkPiece] | type[Completion],
    own: Mapping[str, Any],
) -> None:
    events = exchange.events = Events(exchange)
    async for data in reply.events():
        if data == b"[DONE]":
            break
        if data.startswith(b'{"error"'):
            raise EngineFailure("the engine failed while it answered. Ask again.")
        chunk = _read(kind, data)
        if chunk.usage is not None:
            _count(exchange, chunk.usage)
        elif chunk.choices:
            # As good as can be told should the caller go away; the figures at the end count.
            exchange.completion_tokens += 1
        if exchange.first_token_seconds is None and chunk.choices:
            exchange.first_token_seconds = time.monotonic() - exchange.began
        figures = chunk.usage if request.wants_usage and not chunk.choices else None
        if chunk.choices or figures is not None:
            await events.send(plain(chunk.model_copy(update={**own, "usage": figures})))
    await events.end()


def _count(exchange: Exchange, found: Usage | None) -> None:
    if found is None:
        return
    exchange.prompt_tokens = found.prompt_tokens
    exchange.completion_tokens = found.completion_tokens
    if found.prompt_tokens_details is not None:
        exchange.cached_tokens = found.prompt_tokens_details.cached_tokens


def _read(kind: type[T], raw: bytes) -> T:
    """Return an answer as this server documents it; fields beyond are left out."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError:
        raise EngineFailure(
            "the engine answered with something that is no answer of OpenAI's API."
        ) from None
