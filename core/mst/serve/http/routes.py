"""The endpoints: what each path does, takes and gives."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pydantic import BaseModel

from mst.serve.http.answers import (
    ChatCompletion,
    Completion,
    Embeddings,
    ModelCard,
    ModelList,
    State,
)
from mst.serve.http.chat import chat
from mst.serve.http.completions import completions
from mst.serve.http.embeddings import embeddings
from mst.serve.http.page import PAGES
from mst.serve.http.refusals import Refusal
from mst.serve.http.service import Service
from mst.serve.http.shapes import ChatRequest, CompletionRequest, EmbeddingRequest
from mst.serve.http.wire import Exchange

MODEL = "/v1/models/{id}"


@dataclass(frozen=True)
class Endpoint:
    """A path that takes a JSON body.

    Attributes:
        summary: what it does.
        request: what it takes.
        answer: what it gives.
        work: does it; its last argument is a `request`.
    """

    summary: str
    request: type[BaseModel]
    answer: type[BaseModel]
    work: Callable[..., Awaitable[None]]


POSTS = {
    "/v1/chat/completions": Endpoint(
        "Answer a conversation.", ChatRequest, ChatCompletion, chat
    ),
    "/v1/completions": Endpoint(
        "Go on from a text.", CompletionRequest, Completion, completions
    ),
    "/v1/embeddings": Endpoint(
        "Give the vector of each text.", EmbeddingRequest, Embeddings, embeddings
    ),
}  # fmt: skip
# Path, what it does, and what it gives; None for a text.
GETS: dict[str, tuple[str, type[BaseModel] | None]] = {
    "/v1/models": ("List the models that may be asked.", ModelList),
    MODEL: ("Tell of one model.", ModelCard),
    "/health": ("Say that the server runs.", State),
    "/ready": ("Say whether it takes requests.", State),
    "/metrics": ("Give figures for Prometheus.", None),
    "/openapi.json": ("Give this document.", None),
}


def route_of(path: str, web: bool = False) -> str:
    """Return the route that a path is of, or "other".

    Args:
        path: as it was sent.
        web: the page is served too.
    """
    if path in POSTS or (path in GETS and path != MODEL) or (web and path in PAGES):
        return path
    # The name of a model may have slashes, as "org/name" has.
    if path.startswith("/v1/models/") and len(path) > len("/v1/models/"):
        return MODEL
    return "other"


def check_method(exchange: Exchange) -> None:
    """Refuse a path that isn't there, and a method that it doesn't have.

    Raises:
        Refusal: with what there is.
    """
    if exchange.route == "other":
        raise Refusal(
            404,
            "there is no such path here. GET /openapi.json lists what there is.",
            code="unknown_url",
        )
    method = "POST" if exchange.route in POSTS else "GET"
    if exchange.method != method and not (method == "GET" and exchange.method == "HEAD"):
        raise Refusal(
            405, f"this path takes {method} alone.", code="method_not_allowed",
            headers={"Allow": method},
        )  # fmt: skip


async def state(service: Service, ask: bool) -> State:
    """Return what /health and /ready say.

    Args:
        service: what is served.
        ask: an engine beside the built-in is asked whether it takes requests.
    """
    if service.stopping:
        return State(status="stopping")
    if service.external is not None:
        engine = service.external.supervised
        well = await asyncio.to_thread(engine.well) if ask else engine.state == "ready"
        return State(status="ok" if well else "restarting")
    return State(status="ok")
