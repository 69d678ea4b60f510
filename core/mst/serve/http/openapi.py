"""The OpenAPI document of the server, made of the types that it checks requests by."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import mst
from mst.serve.http.answers import ErrorAnswer
from mst.serve.http.routes import GETS, MODEL, POSTS

_REFUSALS = {
    "400": "The request is wrong; `error.param` names the field.",
    "401": "No API key, or none that the server knows.",
    "403": "Host or Origin is not this server.",
    "404": "No such model or path.",
    "405": "Another method.",
    "408": "The request did not come in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON by its Content-Type.",
    "429": "Too many requests or tokens, or the queue is full; Retry-After says when.",
    "500": "The model failed.",
    "503": "The server is ending, or its engine is started again.",
}


def document() -> dict[str, Any]:
    """Return it as JSON values."""
    requests = [each.request for each in POSTS.values()]
    given = [each.answer for each in POSTS.values()]
    shown = [answer for _, answer in GETS.values() if answer is not None]
    kinds: list[type[BaseModel]] = [*requests, *given, *shown, ErrorAnswer]
    _, definitions = models_json_schema(
        [(each, "validation") for each in dict.fromkeys(kinds)],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {}
    for path, endpoint in POSTS.items():
        content: dict[str, Any] = _json(endpoint.answer.__name__)
        if path != "/v1/embeddings":
            # Without a schema: OpenAPI 3.1 has none for the single events of a stream.
            content["text/event-stream"] = {}
        operation = _operation(endpoint.summary, content)
        operation["requestBody"] = {
            "required": True,
            "content": _json(endpoint.request.__name__),
        }
        paths[path] = {"post": operation}
    for path, (summary, answer) in GETS.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        content = {kind: {"schema": {}}} if answer is None else _json(answer.__name__)
        operation = _operation(summary, content)
        if path == MODEL:
            operation["parameters"] = [
                {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        paths[path] = {"get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mst serve", "version": mst.__version__},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # Without a key too: on loopback none is asked for by default.
        "security": [{}, {"key": []}],
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _operation(summary: str, content: dict[str, Any]) -> dict[str, Any]:
    refusals = {
        status: {"description": words, "content": _json(ErrorAnswer.__name__)}
        for status, words in _REFUSALS.items()
    }
    return {
        "summary": summary,
        "responses": {"200": {"description": "Done.", "content": content}, **refusals},
    }
