"""The server as an ASGI application: who may ask, what is asked, and what is noted of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from mst.seal.redaction import bug_report
from mst.serve.http import routes
from mst.serve.http.access import Keys, Names, check_names
from mst.serve.http.answers import ModelList, plain
from mst.serve.http.forward import FORWARDED
from mst.serve.http.limits import Limits
from mst.serve.http.metrics import KIND, Metrics
from mst.serve.http.openapi import document
from mst.serve.http.page import PAGES, answer_page
from mst.serve.http.refusals import Refusal, of_engine, of_validation, too_many
from mst.serve.http.service import Service, allowed, card, chosen
from mst.serve.http.wire import (
    Exchange,
    Gone,
    Receive,
    Send,
    answer_json,
    answer_text,
    exchange_of,
    read_body,
    until_gone,
)

# What nginx's logs call a caller that went away.
GONE = 499
_BUSY_SECONDS = 2


class App:
    """Answers requests. Nothing of a prompt or an answer is kept, logged or put into an error."""

    def __init__(
        self,
        service: Service,
        names: Names,
        keys: Keys,
        limits: Limits,
        noted: Callable[[Exchange], None] = lambda _: None,
        web: bool = False,
    ) -> None:
        """Answer with this service.

        Args:
            service: the models.
            names: what the server may be called.
            keys: whose keys are good.
            limits: of each request, and of all at once.
            noted: is told of each request when it has ended.
            web: the page is served too.
        """
        self.service, self.metrics = service, Metrics()
        self._names, self._keys, self._limits = names, keys, limits
        self._noted, self._web = noted, web
        self._in_flight = 0

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI calls it."""
        if scope["type"] != "http":  # neither websockets nor a lifespan
            raise NotImplementedError(scope["type"])
        exchange = exchange_of(scope, receive, send)
        exchange.route = routes.route_of(exchange.path, self._web)
        exchange.send_seconds = self._limits.send_seconds
        try:
            await self._guarded(exchange)
        finally:
            if exchange.key is not None:
                tokens = exchange.prompt_tokens + exchange.completion_tokens
                self._keys.quota.spend(exchange.key, tokens)
            self.metrics.add(exchange)
            self._noted(exchange)

    async def _guarded(self, exchange: Exchange) -> None:
        try:
            await self._checked(exchange)
        except Gone:
            self.metrics.gone += 1
            exchange.status = exchange.status or GONE
        except Exception as error:
            refusal = error if isinstance(error, Refusal) else of_engine(error)
            if refusal is None:
                sys.stderr.write(bug_report(error))
                refusal = Refusal(
                    500, "this is a bug in mst; its place is in the server's output.",
                    "server_error", "internal_error",
                )  # fmt: skip
            await _refuse(exchange, refusal)

    async def _checked(self, exchange: Exchange) -> None:
        check_names(self._names, exchange)
        self._keys.check(exchange)
        routes.check_method(exchange)
        if exchange.method != "POST":
            await self._get(exchange)
            return
        if self.service.stopping:
            raise Refusal(503, "this server is ending.", "server_error", "stopping")
        if self._in_flight >= self._limits.requests:
            raise too_many(
                f"{self._limits.requests} requests are being answered or wait already.",
                _BUSY_SECONDS,
                "overloaded",
            )
        self._in_flight += 1
        try:
            await self._post(exchange)
        finally:
            self._in_flight -= 1

    async def _post(self, exchange: Exchange) -> None:
        limits, endpoint = self._limits, routes.POSTS[exchange.route]
        body = await read_body(exchange, limits.body_bytes, limits.body_seconds)
        try:
            request = endpoint.request.model_validate_json(body)
        except ValidationError as error:
            raise of_validation(error) from None

        external = self.service.external is not None
        does = FORWARDED[exchange.route] if external else endpoint.work

        async def work() -> None:
            await does(self.service, exchange, request)

        await until_gone(exchange, work())

    async def _get(self, exchange: Exchange) -> None:
        service = self.service
        exchange.unread = False
        if exchange.route == "/v1/models":
            names = allowed(service, exchange)
            cards = [card(service, each) for each in names]
            await answer_json(exchange, plain(ModelList(data=cards)))
        elif exchange.route == routes.MODEL:
            name = exchange.path.removeprefix("/v1/models/")
            chosen(service, exchange, name)
            await answer_json(exchange, plain(card(service, name)))
        elif exchange.route == "/metrics":
            text = self.metrics.text(service.engine.figures(), self._in_flight)
            await answer_text(exchange, text, KIND)
        elif exchange.route in PAGES:
            await answer_page(exchange)
        elif exchange.route == "/openapi.json":
            await answer_json(exchange, document())
        else:
            asked = exchange.route == "/ready"
            state = await routes.state(service, asked)
            await answer_json(
                exchange, plain(state), 503 if asked and state.status != "ok" else 200
            )


async def _refuse(exchange: Exchange, refusal: Refusal) -> None:
    if exchange.events is not None and exchange.events.begun:
        await exchange.events.fail(refusal)
    elif exchange.status == 0:
        await answer_json(exchange, refusal.body(), refusal.status, refusal.headers)


def log_line(exchange: Exchange) -> str:
    """Return what is logged of a request: no text of it, and no name that a caller made up."""
    tokens = ""
    if exchange.prompt_tokens:
        tokens = (
            f" prompt={exchange.prompt_tokens} cached={exchange.cached_tokens}"
            f" completion={exchange.completion_tokens}"
        )
    key = f" key={exchange.caller}" if exchange.caller else ""
    seconds = time.monotonic() - exchange.began
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return f"{when} {exchange.verb} {exchange.route} {exchange.status}{tokens} {seconds:.3f}s{key}"
