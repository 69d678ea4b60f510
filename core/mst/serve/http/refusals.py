"""What a caller is told when something is refused, in the shape of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mst.serve.engine import (
    EngineFailure,
    Overloaded,
    PromptTooLong,
    SchemaRefused,
    UnknownAdapter,
)

if TYPE_CHECKING:
    from pydantic import ValidationError

_FIELD = re.compile(r"[a-z_][a-z0-9_]{0,40}")
# In a place these are pydantic's, for the type that was tried.
_TYPES = frozenset({"str", "int", "float", "bool"})
# When an engine's queue is full, an answer of a few dozen tokens later there is room.
_BUSY_SECONDS = 2


@dataclass
class Refusal(Exception):
    """An answer that is no answer. Its message never quotes what the caller has sent.

    Attributes:
        status: of HTTP.
        message: what was asked, what was found, what to do.
        kind: OpenAI's `type`.
        code: OpenAI's `code`.
        param: name of the field that is wrong.
        headers: further ones, such as Retry-After.
    """

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return it as JSON."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def wrong(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """Return a refusal of something that the caller can mend."""
    return Refusal(400, message, code=code, param=param)


def too_many(message: str, seconds: int, code: str = "rate_limit_exceeded") -> Refusal:
    """Return a refusal that ends by itself, and say after how many seconds."""
    return Refusal(429, message, code, code, headers={"Retry-After": str(max(1, seconds))})


def of_engine(error: Exception) -> Refusal | None:
    """Return what an engine's error is to the caller; None for a bug."""
    if isinstance(error, PromptTooLong):
        return wrong(str(error), "messages", "context_length_exceeded")
    if isinstance(error, Overloaded):
        return too_many(f"the model is busy: {error}", _BUSY_SECONDS, "overloaded")
    if isinstance(error, SchemaRefused):
        return wrong(str(error), "response_format")
    if isinstance(error, UnknownAdapter):
        return Refusal(404, str(error), code="model_not_found", param="model")
    if isinstance(error, EngineFailure):
        return Refusal(500, str(error), "server_error", "engine_failure")
    return None


def of_validation(error: ValidationError) -> Refusal:
    """Return what is wrong with a request's JSON: its place and the rule, and never the value."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a field that may be of several types there is an error for each; a rule of ours says most.
    first = next((each for each in found if each["type"] == "value_error"), found[0])
    if first["type"] == "json_invalid":
        return wrong("the body is not JSON. Send an object as the OpenAI API documents it.")
    place = ".".join(
        str(each)
        for each in first["loc"]
        if isinstance(each, int) or (_FIELD.fullmatch(each) and each not in _TYPES)
    )
    if first["type"] == "extra_forbidden":
        return wrong(
            f"this server does not know {place or 'a field'}; nothing is ignored in silence."
            " Leave it out. GET /openapi.json lists what there is.",
            place or None,
            "unknown_parameter",
        )
    what = first["msg"].removeprefix("Value error, ")
    return wrong(f"{place or 'the body'}: {what}", place or None)
