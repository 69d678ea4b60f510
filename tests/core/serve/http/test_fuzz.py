"""Whatever is sent, the answer is one: never a bug, and never a word of it in an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.core.serve.http.conftest import HELLO, Caller

MARK = "Xq7z"
# Fields that there are, so that more than names of fields is tried.
FIELDS = (
    "messages", "model", "stream", "stream_options", "stop", "temperature", "top_p", "seed", "n",
    "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice",
    "response_format", "user", "prompt", "input", "echo", "encoding_format", "logit_bias",
)  # fmt: skip
KEYS = st.sampled_from(
    ["role", "content", "type", "text", "function", "name", "parameters", "schema", "json_schema",
     "id", "arguments", "tool_calls", "tool_call_id", "include_usage", MARK]
)  # fmt: skip
WORDS = st.sampled_from(
    ["user", "assistant", "system", "tool", "function", "text", "json_object", "json_schema",
     "auto", "required", "tiny", "float", "object", "", MARK, "\x00", "<|im_end|>", "王", "a" * 300]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | WORDS
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer"]),
         "content": WORDS | st.none() | VALUES},
        optional={"name": WORDS, "tool_call_id": WORDS, "reasoning_content": WORDS,
                  "tool_calls": VALUES},
    ),
    max_size=4,
)  # fmt: skip
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": HELLO, "max_tokens": 2},
    "/v1/completions": {"model": "tiny", "prompt": "a text", "max_tokens": 2},
    "/v1/embeddings": {"model": "tiny", "input": "a text"},
}


@pytest.fixture(scope="module")
def fuzzed(called_once: Callable[..., Caller]) -> Caller:
    return called_once(most_tokens=2)


def check(api: Caller, path: str, body: bytes) -> None:
    reply = api.post(path, body)

    assert reply.status in (200, 400, 404)
    if reply.status != 200:
        assert reply.error["message"]
        # A schema's own words may be told; of all else nothing.
        if reply.error["param"] != "response_format":
            assert MARK not in reply.text


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    path=st.sampled_from(sorted(PATHS)),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
    messages=st.none() | MESSAGES,
)
def test_requests_that_are_almost_right(
    fuzzed: Caller, path: str, changes: dict[str, Any], messages: Any
) -> None:
    body = PATHS[path] | changes
    if messages is not None and "messages" in PATHS[path]:
        body["messages"] = messages
    check(fuzzed, path, json.dumps(body).encode())


@settings(max_examples=100, deadline=None)
@given(path=st.sampled_from(sorted(PATHS)), body=st.binary(max_size=60))
def test_bodies_of_any_bytes(fuzzed: Caller, path: str, body: bytes) -> None:
    check(fuzzed, path, body)
