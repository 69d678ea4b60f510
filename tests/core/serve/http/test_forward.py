"""Requests that are handed on to an engine in a process of its own, without jail and sockets."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mst.data.template import load_template
from mst.data.tokens import TextTokenizer
from mst.serve.engines import EngineStart, ModelToServe
from mst.serve.engines.external import ExternalEngine, started
from mst.serve.engines.job import ExternalJob
from mst.serve.engines.process import Patience
from mst.serve.http.access import Keys, Names
from mst.serve.http.app import App
from mst.serve.http.limits import Limits
from mst.serve.http.prompts import Reader
from mst.serve.http.service import Service

Calls = Any
SECRET = "patient-4711"
TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def parrot(served_model: Path, parrot_site: Path, notes: Path) -> Iterator[ExternalEngine]:
    """The engine of tests/vendor/parrot, which runs until the last test."""
    model = ModelToServe(str(served_model), "merged", "LlamaForCausalLM")
    start = EngineStart(model, "tiny", "cpu", "float32", 512, 8, 1, "", str(notes))
    job = ExternalJob("parrot", "0.4.0", start, ("unix",), ("chat", "completions"))
    patience = Patience(look_seconds=0.05, health_seconds=0.2, wait_seconds=0.1, failures=99)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(parrot_site))
        with started(job, os.environ, lambda line: None, lambda: None, patience) as engine:
            yield engine


@pytest.fixture(scope="module")
def forwarded(
    parrot: ExternalEngine, served_model: Path, tokenizer: TextTokenizer
) -> Callable[..., Calls]:
    from tests.core.serve.http.conftest import Caller

    reader = Reader(tokenizer, load_template(served_model), parrot.context)
    service = Service("tiny", parrot, reader, 64, external=parrot)
    return Caller(App(service, Names(), Keys(None), Limits()))  # type: ignore[return-value]


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}]} | more


def chat(api: Calls, text: str, **more: Any) -> Any:
    return api.post("/v1/chat/completions", said(text, **more))


def back(parrot: ExternalEngine) -> None:
    until = time.monotonic() + 20
    while not parrot.supervised.well():
        assert time.monotonic() < until
        time.sleep(0.05)


def asked_of(notes: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((notes / "last-request.json").read_text())
    return found


def test_an_answer_has_this_servers_shape_and_names(forwarded: Calls) -> None:
    reply = chat(forwarded, "my card is late")

    assert reply.status == 200
    assert reply.json["choices"][0]["message"]["content"] == "my card is late"
    assert reply.json["choices"][0]["finish_reason"] == "stop"
    assert reply.json["model"] == "tiny"
    assert reply.json["id"].startswith("chatcmpl-")
    assert reply.json["usage"]["completion_tokens"] == 4
    assert "feathers" not in reply.text


def test_a_request_reaches_the_engine_made_anew(forwarded: Calls, notes: Path) -> None:
    messages = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": each} for each in ("my ", "fee")]},
    ]
    body = {"model": "tiny", "messages": messages, "max_tokens": 9999, "seed": 7, "user": SECRET}
    reply = forwarded.post("/v1/chat/completions", body)

    assert reply.status == 200
    assert asked_of(notes) == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": "my fee"},
        ],
        # What OpenAI has for its default, and this server's limit.
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 64,
        "seed": 7,
        "stream": False,
    }


def test_a_stream_passes_as_it_comes(forwarded: Calls) -> None:
    with_usage = chat(forwarded, "a b c", stream=True, stream_options={"include_usage": True})
    without = chat(forwarded, "a b c", stream=True)

    texts = [each["choices"][0]["delta"]["content"] for each in without.events]
    assert texts == ["a ", "b ", "c "]
    assert without.events[-1]["choices"][0]["finish_reason"] == "stop"
    assert {each["model"] for each in with_usage.events} == {"tiny"}
    assert with_usage.events[-1]["usage"]["completion_tokens"] == 3
    assert all("usage" not in each for each in without.events)


def test_texts_are_gone_on_from(forwarded: Calls, notes: Path) -> None:
    body = {"model": "tiny", "prompt": "one two", "temperature": 0, "stop": ["x"]}
    reply = forwarded.post("/v1/completions", body)

    assert reply.json["choices"][0]["text"] == "one two"
    assert reply.json["object"] == "text_completion"
    assert asked_of(notes)["max_tokens"] == 16
    assert asked_of(notes)["temperature"] == 0


def test_what_the_engine_has_not_is_refused_by_name(forwarded: Calls) -> None:
    wanted = {"type": "json_object"}
    refused = {
        "response_format": chat(forwarded, "a", response_format=wanted),
        "logprobs": chat(forwarded, "a", logprobs=True),
        None: forwarded.post("/v1/embeddings", {"model": "tiny", "input": "a"}),
    }

    for param, reply in refused.items():
        assert (reply.status, reply.error["param"]) == (400, param)
        assert "--engine builtin" in reply.error["message"]
    assert chat(forwarded, "a", tools=[TOOL]).error["param"] == "tools"
    assert chat(forwarded, "a", presence_penalty=0.5).error["param"] == "presence_penalty"
    assert chat(forwarded, "a", presence_penalty=0, logit_bias={}).status == 200
    echoed = {"model": "tiny", "prompt": "a", "echo": True, "max_tokens": 0}
    assert forwarded.post("/v1/completions", echoed).error["param"] == "echo"
    assert chat(forwarded, "a", model="gpt-4").error["code"] == "model_not_found"
    assert chat(forwarded, "a " * 600).error["code"] == "context_length_exceeded"


def test_an_engines_errors_never_quote_the_prompt(
    forwarded: Calls, capfd: pytest.CaptureFixture[str]
) -> None:
    refused = chat(forwarded, f"refuse {SECRET}")
    failed = chat(forwarded, f"fail {SECRET}")
    nonsense = chat(forwarded, f"nonsense {SECRET}")
    stumbled = chat(forwarded, f"{SECRET} stumble", stream=True)

    assert (refused.status, refused.error["code"]) == (400, "refused_by_engine")
    assert refused.error["param"] == "temperature"
    assert (failed.status, failed.error["code"]) == (500, "engine_failure")
    assert (nonsense.status, nonsense.error["code"]) == (500, "engine_failure")
    assert stumbled.events[-1]["error"]["message"].startswith("the engine failed while it answered")
    assert not any(SECRET in each.text for each in (refused, failed, nonsense))
    assert SECRET not in json.dumps(stumbled.events[-1])
    assert SECRET not in "".join(capfd.readouterr())


def test_a_request_under_way_when_the_engine_is_killed_gets_an_error(
    forwarded: Calls, parrot: ExternalEngine
) -> None:
    before = parrot.figures().restarts
    whole = chat(forwarded, "please die")
    ready = forwarded.get("/ready")
    later = chat(forwarded, "hello")

    assert (whole.status, whole.error["code"]) == (500, "engine_failure")
    assert "ended before the answer was whole" in whole.error["message"]
    assert (ready.status, ready.json) == (503, {"status": "restarting"})
    assert (later.status, later.error["code"]) == (503, "engine_restarting")
    assert later.headers["retry-after"]
    assert forwarded.get("/health").status == 200
    back(parrot)
    assert forwarded.get("/ready").json == {"status": "ok"}
    assert parrot.figures().restarts == before + 1
    assert f"mst_engine_restarts_total {before + 1}" in forwarded.get("/metrics").text


def test_a_stream_under_way_when_the_engine_is_killed_ends_with_an_error(
    forwarded: Calls, parrot: ExternalEngine
) -> None:
    reply = chat(forwarded, "please die", stream=True)

    assert reply.events[0]["choices"][0]["delta"]["content"] == "please "
    assert reply.events[-1]["error"]["code"] == "engine_failure"
    back(parrot)


def test_a_caller_who_goes_away_ends_the_answer(
    forwarded: Calls, parrot: ExternalEngine, notes: Path
) -> None:
    (notes / "gone").unlink(missing_ok=True)
    before = parrot.figures().cancelled
    body = json.dumps(said("slowly on and on", stream=True)).encode()
    kind = {"content-type": "application/json"}
    forwarded.call("POST", "/v1/chat/completions", body, kind, leave_after=3)

    until = time.monotonic() + 10
    while not (notes / "gone").is_file():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert parrot.figures().cancelled == before + 1
    assert parrot.figures().running == 0


def test_a_killed_engine_makes_the_server_unready_without_a_request(
    forwarded: Calls, parrot: ExternalEngine
) -> None:
    pid = parrot.supervised.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)

    assert forwarded.get("/ready").status == 503
    back(parrot)
