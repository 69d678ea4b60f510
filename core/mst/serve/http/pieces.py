"""Pieces of a streamed chat as other engines send them: a call of a tool comes in parts."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from mst.serve.http.answers import ChatLogprobs, Usage


class FunctionPiece(BaseModel):
    """A part of a call's name and of its arguments' JSON text."""

    name: str | None = None
    arguments: str | None = None


class CallPiece(BaseModel):
    """A part of a call; the first of a call has its id."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionPiece | None = None


class DeltaPiece(BaseModel):
    """What has come since the last piece."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallPiece] | None = None


class ChoicePiece(BaseModel):
    """A piece of one answer."""

    index: int
    delta: DeltaPiece
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None


class ChunkPiece(BaseModel):
    """One event of a streamed chat."""

    id: str = ""
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int = 0
    model: str = ""
    choices: list[ChoicePiece]
    usage: Usage | None = None
