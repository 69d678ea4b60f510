"""What is refused, and how it is said: OpenAI's shape, and never a word of the prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.core.serve.http.conftest import HELLO, Caller

from mst.serve import api_keys
from mst.serve.engine import Engine
from mst.serve.http.access import Keys, Names
from mst.serve.http.app import App, log_line
from mst.serve.http.limits import Limits
from mst.serve.http.prompts import Reader
from mst.serve.http.service import Service
from mst.serve.http.wire import Exchange

SECRET = "patient-4711"
CHAT = "/v1/chat/completions"
PICTURE = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:1/{SECRET}.png"}}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": SECRET, "content": "x"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content is missing"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content", "valid string"),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, "messages.0.content.0",
         "reads text alone"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"n": True}, "n", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "up to 4 texts"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"top_logprobs": 3}, None, "goes with logprobs"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "less than or equal to 100"),
        ({"logit_bias": {SECRET: 1}}, "logit_bias", "match pattern"),
        ({"logit_bias": {"6400": 1}}, "logit_bias", "0 to 6399"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"best_guess": SECRET}, "best_guess", "does not know best_guess"),
        ({SECRET + " key": 1}, None, "does not know a field"),
        ({"stream_options": {"include_usage": True}}, None, "goes with stream"),
        ({"tool_choice": "required"}, None, "goes with tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "x", "schema": {"type": SECRET}}}},
            "response_format", "schema",
        ),
        (
            {"tool_choice": "required", "tools": [{"type": "function", "function": {
                "name": "x", "parameters": {"type": SECRET}}}]},
            "tools", "schema",
        ),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": f"[{SECRET}"}}]}]},
         "messages", "arguments of a call"),
    ],
)  # fmt: skip
def test_a_wrong_request_says_where(
    api: Caller, change: dict[str, Any], param: str | None, words: str
) -> None:
    reply = api.chat(**change)

    assert reply.status == 400, reply.text
    assert words in reply.error["message"]
    if param is not None:
        assert reply.error["param"] == param
    assert reply.error["type"] == "invalid_request_error"
    if "schema" not in words:
        assert SECRET not in reply.text


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "tiny", "model"', b"[" * 100_000,
     b'{"model": "\\ud800"}'],
)  # fmt: skip
def test_what_is_no_json_is_refused(api: Caller, body: bytes) -> None:
    reply = api.post(CHAT, body)

    assert reply.status == 400
    assert reply.error["message"]


def test_a_text_of_another_type_is_refused(api: Caller) -> None:
    reply = api.post(CHAT, b"{}", headers={"content-type": "text/plain"})

    assert reply.status == 415
    assert reply.headers["connection"] == "close"


def test_an_unknown_model_is_named_beside_those_there_are(api: Caller) -> None:
    reply = api.chat(model="gpt-4")

    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert "there is: tiny" in reply.error["message"]
    assert "gpt-4" not in reply.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_names_the_limit(api: Caller, stream: bool) -> None:
    reply = api.chat(messages=[{"role": "user", "content": SECRET * 400}], stream=stream)

    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert "512 tokens" in reply.error["message"]
    assert SECRET not in reply.text


def test_a_template_that_refuses_is_no_bug(engine: Engine, reader: Reader) -> None:
    from dataclasses import replace

    source = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "{{ messages[0].content.nothing.at_all }}"
    )
    strict = replace(reader, template=replace(reader.template, source=source))
    api = Caller(App(Service("tiny", engine, strict, 8), Names(), Keys(None), Limits()))
    first = api.chat(messages=[{"role": "system", "content": SECRET}])
    second = api.chat(messages=[{"role": "user", "content": SECRET}])

    assert first.status == second.status == 400
    assert "(system): user first" in first.error["message"]
    assert "UndefinedError" in second.error["message"]
    assert SECRET not in first.text + second.text
    assert reader.template.origin not in first.text


def test_tools_that_the_template_leaves_out_are_refused(engine: Engine, reader: Reader) -> None:
    from dataclasses import replace

    bare = replace(reader, template=replace(reader.template, source="{{ messages[0].content }}"))
    api = Caller(App(Service("tiny", engine, bare, 8), Names(), Keys(None), Limits()))
    tools = [{"type": "function", "function": {"name": "f"}}]
    reply = api.chat(tools=tools)

    assert (reply.status, reply.error["param"]) == (400, "tools")
    assert api.chat(tools=tools, tool_choice="none").status == 200


def test_a_template_that_makes_too_much_is_stopped(engine: Engine, reader: Reader) -> None:
    from dataclasses import replace

    source = "{{ messages[0].content * 1000000000 }}"
    endless = replace(reader, template=replace(reader.template, source=source))
    api = Caller(App(Service("tiny", engine, endless, 8), Names(), Keys(None), Limits()))
    reply = api.chat()

    assert reply.status == 400
    assert "takes too long" in reply.error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("POST", "/v1/models", 405), ("GET", "/", 404), ("GET", "/docs", 404),
     ("POST", "/v1/chat/completions/", 404), ("DELETE", "/v1/models/tiny", 405),
     (SECRET, "/health", 405)],
)  # fmt: skip
def test_other_paths_and_methods_are_refused(
    api: Caller, method: str, path: str, status: int
) -> None:
    reply = api.call(method, path, b"", {})

    assert reply.status == status
    assert reply.error["code"] in ("unknown_url", "method_not_allowed")
    assert SECRET not in reply.text + api.get("/metrics").text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200), ("localhost", 200), ("LOCALHOST:1", 200), ("[::1]:8000", 200),
        ("localhost.", 200), ("attacker.example:8000", 403), ("", 403), ("127.0.0.1.evil.org", 403),
        ("evil.example@127.0.0.1", 403), ("10.0.0.1", 403), ("[::1", 403), ("127.0.0.1, evil", 403),
    ],
)  # fmt: skip
def test_only_own_names_are_answered(api: Caller, host: str, status: int) -> None:
    assert api.get("/health", host=host).status == status


def test_beyond_loopback_numbers_and_given_names_are_answered(
    called: Callable[..., Caller],
) -> None:
    api = called(names=Names(("llm.ward.example",), any_address=True))

    assert api.get("/health", host="10.1.2.3:8000").status == 200
    assert api.get("/health", host="LLM.ward.example").status == 200
    assert api.get("/health", host="evil.example").status == 403
    assert called(names=Names(any_name=True)).get("/health", host="anything").status == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://127.0.0.1:8000", 200), ("http://evil.example", 403), ("null", 403),
     ("https://127.0.0.1:8000", 403), ("http://127.0.0.1:3000", 403)],
)  # fmt: skip
def test_pages_of_other_sites_are_refused(api: Caller, origin: str, status: int) -> None:
    reply = api.get("/v1/models", origin=origin)

    assert reply.status == status
    assert not [each for each in reply.headers if each.startswith("access-control")]


def test_a_body_that_says_it_is_large_is_not_read(called: Callable[..., Caller]) -> None:
    api = called(body_bytes=1000)
    reply = api.call(
        "POST", CHAT, b"x", {"content-type": "application/json", "content-length": "100000000"},
        stall=True,
    )  # fmt: skip

    assert reply.status == 413
    assert "1000 bytes" in reply.error["message"]
    assert reply.headers["connection"] == "close"


def test_a_body_that_turns_out_to_be_large_is_not_read_on(called: Callable[..., Caller]) -> None:
    api = called(body_bytes=1000)
    reply = api.post(CHAT, b"x" * 5000, pieces=50, stall=True)

    assert reply.status == 413


def test_a_body_that_does_not_come_is_not_waited_for(called: Callable[..., Caller]) -> None:
    reply = called(body_seconds=0.05).post(CHAT, b"{}" * 10, pieces=2, stall=True)

    assert reply.status == 408


def test_a_server_that_ends_takes_nothing_new(api: Caller) -> None:
    assert api.get("/ready").json == {"status": "ok"}
    api.app.service.stopping = True

    assert api.get("/ready").status == 503
    assert api.get("/health").status == 200
    assert api.chat().status == 503


def test_too_many_at_once_are_told_to_come_again(called: Callable[..., Caller]) -> None:
    reply = called(requests=0).chat()

    assert (reply.status, reply.error["code"]) == (429, "overloaded")
    assert int(reply.headers["retry-after"]) >= 1


def test_a_full_queue_is_no_bug(called: Callable[..., Caller], monkeypatch: Any) -> None:
    from mst.serve.engine import Overloaded

    api = called()

    def full(*_: object) -> int:
        raise Overloaded("256 prompts are waiting already.")

    monkeypatch.setattr(api.app.service.engine, "submit", full)
    reply = api.chat()

    assert reply.status == 429
    assert "waiting already" in reply.error["message"]
    assert "retry-after" in reply.headers


def test_a_bug_is_told_by_its_place_alone(
    called: Callable[..., Caller], monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    api = called()

    def broken(*_: object) -> int:
        raise KeyError(SECRET)

    monkeypatch.setattr(api.app.service.engine, "submit", broken)
    reply = api.chat()
    shown = capsys.readouterr().err

    assert (reply.status, reply.error["type"]) == (500, "server_error")
    assert "KeyError" in shown
    assert SECRET not in shown + reply.text


def test_a_failure_in_a_stream_is_its_last_event(
    called: Callable[..., Caller], monkeypatch: Any
) -> None:
    from mst.serve.engine import EngineFailure

    api = called()
    real = api.app.service.engine.submit

    def failing(prompt: Any, told: Any) -> int:
        told(EngineFailure("the device has gone."))
        return real(prompt, lambda _: None)

    monkeypatch.setattr(api.app.service.engine, "submit", failing)
    reply = api.chat(stream=True)

    assert reply.status == 200
    assert reply.events[-1]["error"]["message"] == "the device has gone."


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "state" / "api-keys.json"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_with_keys_only_their_owners_may_ask(called: Callable[..., Caller], keys: Path) -> None:
    key = api_keys.add(keys, "ward")
    api = called(keys=keys)
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2}

    for headers in ({}, bearer("mst-wrong"), bearer(key[:-1]), {"authorization": f"Basic {key}"}):
        reply = api.post(CHAT, body, headers=headers)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
    assert api.post(CHAT, body, headers=bearer(key)).status == 200
    assert api.get("/v1/models").status == 401
    assert api.get("/metrics").status == 401
    assert api.get("/health").status == api.get("/ready").status == 200


def test_a_key_that_is_taken_away_is_refused_at_once(
    called: Callable[..., Caller], keys: Path
) -> None:
    key = api_keys.add(keys, "ward")
    api = called(keys=keys)

    assert api.get("/v1/models", **bearer(key)).status == 200
    api_keys.remove(keys, "ward")
    other = api_keys.add(keys, "other")

    assert api.get("/v1/models", **bearer(key)).status == 401
    assert api.get("/v1/models", **bearer(other)).status == 200
    keys.chmod(0o644)
    keys.touch()

    assert called(keys=keys).get("/v1/models", **bearer(other)).status == 401


def test_a_key_has_its_limits(called: Callable[..., Caller], keys: Path) -> None:
    api = called(keys=keys)
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
    often = bearer(api_keys.add(keys, "often", requests_per_minute=2))
    much = bearer(api_keys.add(keys, "much", tokens_per_day=5))
    elsewhere = bearer(api_keys.add(keys, "elsewhere", models=["other"]))

    assert [api.post(CHAT, body, headers=often).status for _ in range(3)] == [200, 200, 429]
    assert [api.post(CHAT, body, headers=much).status for _ in range(2)] == [200, 429]
    reply = api.post(CHAT, body, headers=elsewhere)

    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert api.get("/v1/models", **elsewhere).json["data"] == []
    refused = api.post(CHAT, body, headers=often)

    assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_callers_do_not_share_what_is_kept_of_prompts(
    called: Callable[..., Caller], keys: Path
) -> None:
    one, other = (bearer(api_keys.add(keys, name)) for name in ("one", "other"))
    api = called(keys=keys)
    body = {"model": "tiny", "max_tokens": 2,
            "messages": [{"role": "user", "content": "kept for one caller " * 9}]}  # fmt: skip

    def cached(headers: dict[str, str]) -> int:
        usage = api.post(CHAT, body, headers=headers).json["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached(one) < 20
    assert cached(other) < 20
    assert cached(one) > 40


def test_the_log_has_figures_and_no_text(engine: Engine, reader: Reader, keys: Path) -> None:
    lines: list[str] = []

    def noted(exchange: Exchange) -> None:
        lines.append(log_line(exchange))

    key = api_keys.add(keys, "ward")
    service = Service("tiny", engine, reader, 8)
    api = Caller(App(service, Names(), Keys(keys), Limits(), noted))
    body = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "user": SECRET}
    reply = api.post(CHAT, body, headers=bearer(key))
    api.post(CHAT + f"?q={SECRET}", body)
    api.get(f"/{SECRET}", **bearer(key))
    api.get(f"/v1/models/{SECRET}", **bearer(key))
    text = "\n".join(lines)

    assert reply.status == 200
    assert f"POST {CHAT} 200 prompt=" in lines[0]
    assert lines[0].endswith("key=ward")
    assert "GET other 404" in text
    assert "GET /v1/models/{id} 404" in text
    assert SECRET not in text
    assert key not in text
    assert json.dumps(reply.json["choices"][0]["message"]["content"])[1:-1] not in text
