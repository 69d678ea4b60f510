"""Conversations over the API: the engine's tokens as OpenAI's JSON, whole and as they come."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.core.serve.http.conftest import HELLO, Caller

from mst.data.rows import Message
from mst.data.template import load_template, render
from mst.data.tokens import TextTokenizer
from mst.serve.engine import Choice, Engine, EngineFailure, Prompt, Token
from mst.serve.http.answers import ChatChunk, ChatChunkChoice, Delta, plain
from mst.serve.http.chat import _answers, _head, _piece
from mst.serve.http.generation import Asked
from mst.serve.http.shapes import ChatRequest
from mst.serve.http.wire import dumped

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}


def content(reply: Any) -> str:
    return str(reply.json["choices"][0]["message"]["content"])


def streamed(events: list[Any], index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for each in events
        for choice in each["choices"]
        if choice["index"] == index
    )


def test_an_answer_is_the_greedy_one_of_transformers(
    api: Caller, tokenizer: TextTokenizer, served_model: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    reply = api.chat()
    model: Any = AutoModelForCausalLM.from_pretrained(served_model)
    text = render(load_template(served_model), [Message("user", "my card is late")], True)
    ids = tokenizer.encode(text).ids
    out = model.eval().generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )

    assert content(reply) == tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=True)
    assert reply.json["choices"][0]["finish_reason"] == "length"
    assert reply.json["usage"]["prompt_tokens"] == len(ids)
    assert reply.json["usage"]["completion_tokens"] == 6
    assert reply.json["usage"]["total_tokens"] == len(ids) + 6


def test_a_stream_says_what_the_whole_answer_says(api: Caller) -> None:
    whole = content(api.chat(max_tokens=20))
    reply = api.chat(max_tokens=20, stream=True, stream_options={"include_usage": True})
    first, *_, last, figures = reply.events

    assert reply.headers["content-type"].startswith("text/event-stream")
    assert streamed(reply.events) == whole
    assert len(reply.events) > 5
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["choices"][0]["delta"] == {}
    assert figures["choices"] == []
    assert figures["usage"]["completion_tokens"] == 20
    assert "usage" not in last


def test_the_same_prompt_again_comes_from_the_cache(api: Caller) -> None:
    message = [{"role": "user", "content": "a long text " * 20}]
    api.chat(messages=message)
    details = api.chat(messages=message).json["usage"]["prompt_tokens_details"]

    assert details["cached_tokens"] > 40


def test_several_answers_differ_by_their_seeds_and_repeat(api: Caller) -> None:
    def texts(**more: Any) -> list[str]:
        reply = api.chat(temperature=1.5, n=3, **more)
        return [each["message"]["content"] for each in reply.json["choices"]]

    one = texts(seed=5)

    assert len(set(one)) == 3
    assert texts(seed=5) == one
    assert texts(seed=6)[0] == one[1]
    assert texts() != texts()


def test_several_answers_come_side_by_side_in_a_stream(api: Caller) -> None:
    options = {"temperature": 1.0, "n": 2, "seed": 9}
    whole = api.chat(**options).json["choices"]
    events = api.chat(**options, stream=True).events

    assert [streamed(events, index) for index in (0, 1)] == [
        each["message"]["content"] for each in whole
    ]
    assert [each["choices"][0]["index"] for each in events[:2]] == [0, 1]


def test_a_stop_text_ends_an_answer_and_is_not_shown(api: Caller) -> None:
    whole = content(api.chat(max_tokens=20))
    stop = whole[7:10]
    reply = api.chat(max_tokens=20, stop=[stop, "never that"])
    events = api.chat(max_tokens=20, stop=stop, stream=True).events

    assert content(reply) == whole[: whole.index(stop)]
    assert reply.json["choices"][0]["finish_reason"] == "stop"
    assert reply.json["usage"]["completion_tokens"] < 20
    assert streamed(events) == content(reply)
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_name_tokens_and_their_bytes(api: Caller) -> None:
    reply = api.chat(logprobs=True, top_logprobs=3)
    entries = reply.json["choices"][0]["logprobs"]["content"]
    events = api.chat(logprobs=True, top_logprobs=3, stream=True).events
    pieces = [
        each["choices"][0]["logprobs"]["content"]
        for each in events
        if each["choices"][0].get("logprobs")
    ]

    assert len(entries) == 6
    assert b"".join(bytes(each["bytes"]) for each in entries).decode() == content(reply)
    assert all(len(each["top_logprobs"]) == 3 for each in entries)
    # Greedy: the likeliest is the one that came.
    assert all(each["token"] == each["top_logprobs"][0]["token"] for each in entries)
    assert all(each["logprob"] <= 0 for each in entries)
    assert [each["token"] for piece in pieces for each in piece] == [
        each["token"] for each in entries
    ]


def test_a_schema_holds_the_answer(called: Callable[..., Caller]) -> None:
    schema = {
        "type": "object",
        "properties": {"town": {"enum": ["Rome", "Oslo"]}, "late": {"type": "boolean"}},
        "required": ["town", "late"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "trip", "schema": schema}}
    api = called(most_tokens=256)
    reply = api.chat(response_format=wanted, temperature=1.0, seed=1, max_tokens=200)
    found = json.loads(content(reply))

    assert found["town"] in ("Rome", "Oslo")
    assert isinstance(found["late"], bool)
    assert reply.json["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_has_to_be_called_is_called(
    called: Callable[..., Caller], stream: bool
) -> None:
    api = called(most_tokens=256)
    choice = {"type": "function", "function": {"name": "weather"}}
    reply = api.chat(tools=[TOOL], tool_choice=choice, max_tokens=200, stream=stream)
    if stream:
        choices = [each["choices"][0] for each in reply.events]
        calls = next(
            each["delta"]["tool_calls"] for each in choices if "tool_calls" in each["delta"]
        )
        assert calls[0]["index"] == 0
        assert streamed(reply.events) == ""
        finish = choices[-1]["finish_reason"]
    else:
        message = reply.json["choices"][0]["message"]
        assert message["content"] is None
        calls, finish = message["tool_calls"], reply.json["choices"][0]["finish_reason"]

    assert finish == "tool_calls"
    assert calls[0]["function"]["name"] == "weather"
    assert json.loads(calls[0]["function"]["arguments"])["town"] in ("Rome", "Oslo")
    assert calls[0]["id"].startswith("call_")


@pytest.mark.parametrize(("several", "count"), [(None, 2), (True, 2), (False, 1)])
def test_one_call_is_given_where_several_are_not_wanted(
    api: Caller, several: bool | None, count: int
) -> None:
    given = {"model": "tiny", "messages": HELLO, "tools": [TOOL], "parallel_tool_calls": several}
    (answer,) = _answers(api.app.service, ChatRequest.model_validate(given))
    call = '{"name": "weather", "arguments": {}}'
    *ids, last = api.app.service.reader.tokenizer.encode(f"[{call}, {call}]").ids
    for each in ids:
        assert answer.push(Token(each), ends=False) == ""
    answer.push(Token(last, finish="length"), ends=False)

    assert len(answer.calls) == count


def test_any_of_two_tools_has_to_be_called(api: Caller) -> None:
    other = {"type": "function", "function": {"name": "time"}}
    reply = api.chat(tools=[TOOL, other], tool_choice="required", max_tokens=200, temperature=1)
    choice = reply.json["choices"][0]
    if choice["finish_reason"] == "tool_calls":
        assert choice["message"]["tool_calls"][0]["function"]["name"] in ("weather", "time")
    else:
        # Random weights may write white space and arguments for ever, but nothing else.
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"].lstrip().startswith("{")


def test_the_results_of_tools_reach_the_template(api: Caller) -> None:
    call = {"id": "c1", "type": "function", "index": 0,
            "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}  # fmt: skip
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}],
        },
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    habits = {"modalities": ["text"], "safety_identifier": "x", "prompt_cache_key": "y"}
    with_tools = api.chat(messages=messages, tools=[TOOL], **habits)
    without = api.chat(messages=messages, tools=[TOOL], tool_choice="none")

    assert with_tools.status == 200, with_tools.text
    used = [each.json["usage"]["prompt_tokens"] for each in (with_tools, without)]
    assert used[0] > used[1] + 20


# Of an answer, so many that nobody waits for the end by mistake.
LONG = 480


def wait_for_cancelled(engine: Engine, before: int) -> None:
    deadline = time.monotonic() + 60
    while engine.figures().cancelled == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_caller_that_goes_away_stops_the_engine(
    called: Callable[..., Caller], engine: Engine
) -> None:
    api, before = called(most_tokens=LONG), engine.figures()
    # Greedy: random draws may end it before.
    body = {"model": "tiny", "messages": HELLO, "stream": True, "max_tokens": LONG}
    api.post("/v1/chat/completions", body | {"temperature": 0}, leave_after=4)
    wait_for_cancelled(engine, before.cancelled)

    assert engine.figures().generated_tokens - before.generated_tokens < LONG - 50
    assert api.app.metrics.gone == 1


def test_a_caller_that_waits_for_the_whole_and_leaves_stops_it_too(
    called: Callable[..., Caller], engine: Engine
) -> None:
    api, before = called(most_tokens=LONG), engine.figures().cancelled
    body = {"model": "tiny", "messages": HELLO, "max_tokens": LONG, "temperature": 0}
    reply = api.post("/v1/chat/completions", body, leave_after=0)
    wait_for_cancelled(engine, before)

    assert reply.status == 0


def test_a_caller_that_leaves_while_its_prompt_is_queued_is_not_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.figures().cancelled
    real, left = engine.submit, threading.Event()

    def slow(prompt: Prompt, told: Callable[[Token | EngineFailure], None]) -> int:
        left.wait(20)
        return real(prompt, told)

    async def gone() -> None:
        asked = Asked(engine, [Prompt((5, 6, 7), Choice(LONG, temperature=0))])
        begun = asyncio.create_task(asked.__aenter__())
        await asyncio.sleep(0.05)
        begun.cancel()
        with pytest.raises(asyncio.CancelledError):
            await begun
        left.set()

    monkeypatch.setattr(engine, "submit", slow)
    asyncio.run(gone())
    wait_for_cancelled(engine, before)

    assert engine.figures().running == 0


def test_a_caller_that_does_not_read_is_not_waited_for(called: Callable[..., Caller]) -> None:
    api = called(send_seconds=0.05)
    body = {"model": "tiny", "messages": HELLO, "stream": True, "max_tokens": 20}
    reply = api.post("/v1/chat/completions", body, read=3)

    assert len(reply.chunks) == 2
    assert api.app.metrics.gone == 1
    assert api.chat().status == 200


def test_an_answer_is_as_long_as_there_is_room(called: Callable[..., Caller]) -> None:
    api = called(most_tokens=5)

    assert api.chat(max_tokens=10**9).json["usage"]["completion_tokens"] <= 5
    long = [{"role": "user", "content": "x y " * 230}]
    reply = called(most_tokens=64).chat(messages=long, max_tokens=64)
    used = reply.json["usage"]

    assert used["prompt_tokens"] > 450
    assert used["total_tokens"] <= 512


def test_pieces_of_text_are_what_their_type_says() -> None:
    text = 'a "quoted" \\ é \U0001f99c\n'
    chunk = ChatChunk(
        id="x", created=7, model='n"m',
        choices=[ChatChunkChoice(index=2, delta=Delta(content=text))],
    )  # fmt: skip

    assert _piece(_head("x", 7, 'n"m'), 2, text) == dumped(plain(chunk))
