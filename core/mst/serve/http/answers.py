"""What callers get: OpenAI's answers, as JSON and as the OpenAPI document describes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class Cached(BaseModel):
    """How much of a prompt was not computed, because it was kept from before."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request; the one that ends an answer counts."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: Cached | None = None


class TopToken(BaseModel):
    """A token that could have come, with its log-probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopToken):
    """A token that came, and the likeliest in its place."""

    top_logprobs: list[TopToken]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class FunctionCall(BaseModel):
    """Which tool to call; the arguments are JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call; `index` stands in streams alone."""

    index: int | None = None
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """An answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What has come since the last piece."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None


class ChatChunk(BaseModel):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the older shape; a prompt's first token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """An answer to POST /v1/completions, or one event of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Embedding(BaseModel):
    """The vector of one text; base64 holds little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """An answer to POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class ModelCard(BaseModel):
    """A model that may be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mst"
    max_model_len: int


class ModelList(BaseModel):
    """An answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class State(BaseModel):
    """An answer to GET /health and /ready."""

    status: Literal["ok", "stopping", "restarting"]


class ErrorDetail(BaseModel):
    """What was refused, and why."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Any refusal."""

    error: ErrorDetail


# Clients look for these also where they are null; for content in whole messages alone.
_NULLS = frozenset({"finish_reason", "logprobs", "refusal", "bytes"})


def plain(answer: BaseModel) -> dict[str, Any]:
    """Return an answer as JSON values, without what it does not have."""
    found: dict[str, Any] = _pruned(answer.model_dump())
    return found


def _pruned(value: Any) -> Any:
    if isinstance(value, list):
        return [_pruned(each) for each in value]
    if isinstance(value, dict):
        return {
            name: _pruned(each)
            for name, each in value.items()
            if each is not None or name in _NULLS or (name == "content" and "refusal" in value)
        }
    return value
