"""What all endpoints of a served model share: which models there are, and what is asked of them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mst.serve.engine import Choice, Engine, Prompt, Token
from mst.serve.engines.external import ExternalEngine
from mst.serve.http.access import may_ask
from mst.serve.http.answers import Cached, ModelCard, Usage
from mst.serve.http.prompts import Reader
from mst.serve.http.refusals import Refusal, wrong
from mst.serve.http.shapes import Sampled
from mst.serve.http.wire import Exchange

# OpenAI's default of the older endpoint.
COMPLETION_TOKENS = 16


@dataclass
class Service:
    """A model that is served.

    Attributes:
        name: of the model that an engine was started with; adapters have their own.
        engine: answers prompts.
        reader: makes prompts.
        most_tokens: longest answer that a request may have.
        created: when, in seconds since 1970.
        stopping: nothing new is to be sent here.
        external: the engine where requests are handed on to one beside the built-in; it is `engine`
            too, for its figures and limits.
        reading: how many requests for embeddings, or for how likely prompts are, are computed at
            once; others wait.
    """

    name: str
    engine: Engine
    reader: Reader
    most_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    stopping: bool = False
    external: ExternalEngine | None = None
    reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2), repr=False)

    @property
    def models(self) -> tuple[str, ...]:
        """The names that `model` may have."""
        return (self.name, *self.engine.adapters)


def card(service: Service, name: str) -> ModelCard:
    """Return what is told of a model."""
    return ModelCard(id=name, created=service.created, max_model_len=service.engine.context)


def allowed(service: Service, exchange: Exchange) -> tuple[str, ...]:
    """Return the names of the models that a caller may ask."""
    return tuple(each for each in service.models if may_ask(exchange.key, each))


def chosen(service: Service, exchange: Exchange, model: str) -> str | None:
    """Note which model is asked, and return its adapter.

    Raises:
        Refusal: there is none of that name, or not for this caller.
    """
    known = allowed(service, exchange)
    if model not in known:
        raise Refusal(
            404,
            f"there is no model of that name here (there is: {', '.join(known) or 'none for you'})."
            " Set the field model to one of these.",
            code="model_not_found",
            param="model",
        )
    exchange.model = model
    return None if model == service.name else model


def prompts_of(
    service: Service,
    exchange: Exchange,
    request: Sampled,
    ids: tuple[int, ...],
    choice: Choice,
    adapter: str | None,
) -> list[Prompt]:
    """Return a prompt for each answer that is wanted: the same, with another seed.

    Args:
        service: what is served.
        exchange: who asks.
        request: what is wanted.
        ids: of the prompt.
        choice: how the first answer is chosen, its length not yet cut to what there is room for.
        adapter: as `chosen` returned it.
    """
    room = service.engine.context - len(ids)
    most = max(1, min(choice.max_new_tokens, service.most_tokens, room))
    return [
        Prompt(
            ids=ids,
            choice=replace(choice, max_new_tokens=most, seed=(choice.seed + number) % 2**63),
            adapter=adapter,
            caller=exchange.caller,
        )
        for number in range(request.n or 1)
    ]


def choice_of(service: Service, request: Sampled, most: int, top: int | None) -> Choice:
    """Return how a request wants its tokens chosen; a seed that it doesn't give is drawn.

    Raises:
        Refusal: a bias is for a token that the model does not have.
    """
    seed = request.seed % 2**63 if request.seed is not None else secrets.randbits(63)
    return Choice(
        max_new_tokens=most,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=seed,
        top_logprobs=top,
        stop_ids=frozenset(service.reader.tokenizer.eos_token_ids),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_biases(service, request),
    )


def _biases(service: Service, request: Sampled) -> tuple[tuple[int, float], ...]:
    biases = tuple((int(token), bias) for token, bias in (request.logit_bias or {}).items())
    size = service.reader.tokenizer.vocab_size
    if any(token >= size for token, _ in biases):
        raise wrong(f"token ids are numbers from 0 to {size - 1} with this model.", "logit_bias")
    return biases


def count_prompts(exchange: Exchange, prompts: Sequence[Sequence[int]]) -> None:
    """Count the tokens of prompts; of several answers to one, once."""
    exchange.prompt_tokens += sum(map(len, prompts))


def count(exchange: Exchange, token: Token, first: bool) -> None:
    """Count a token of an answer.

    Args:
        exchange: whose.
        token: that came.
        first: of its answer's, where `Token.cached` is counted.
    """
    exchange.completion_tokens += 1
    if first:
        exchange.cached_tokens = max(exchange.cached_tokens, token.cached)
    if exchange.first_token_seconds is None:
        exchange.first_token_seconds = time.monotonic() - exchange.began


def usage(exchange: Exchange) -> Usage:
    """Return what was counted."""
    return Usage(
        prompt_tokens=exchange.prompt_tokens,
        completion_tokens=exchange.completion_tokens,
        total_tokens=exchange.prompt_tokens + exchange.completion_tokens,
        prompt_tokens_details=Cached(cached_tokens=exchange.cached_tokens),
    )
