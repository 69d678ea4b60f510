"""Completions, embeddings, models, metrics and the OpenAPI document."""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.core.serve.http.conftest import HELLO, Caller, Reply

from mst.data.tokens import TextTokenizer

COMPLETIONS = "/v1/completions"


def complete(api: Caller, **more: Any) -> Reply:
    body = {"model": "tiny", "prompt": "my card is", "max_tokens": 5, "temperature": 0}
    return api.post(COMPLETIONS, body | more)


def texts(reply: Reply) -> list[str]:
    return [each["text"] for each in reply.json["choices"]]


def test_a_text_and_its_tokens_go_on_alike(api: Caller, tokenizer: TextTokenizer) -> None:
    ids = tokenizer.tokenizer.encode("my card is").ids
    text = complete(api)

    assert texts(text) == texts(complete(api, prompt=ids))
    assert text.json["usage"]["prompt_tokens"] == len(ids)
    assert text.json["choices"][0]["finish_reason"] == "length"


def test_several_prompts_are_answered_in_their_order(api: Caller) -> None:
    one, other = texts(complete(api))[0], texts(complete(api, prompt="the fee"))[0]
    reply = complete(api, prompt=["my card is", "the fee"], n=2)

    assert texts(reply) == [one, one, other, other]
    assert [each["index"] for each in reply.json["choices"]] == [0, 1, 2, 3]
    assert complete(api, prompt=[[1, 320], [1, 275]]).status == 200


def test_echo_and_streams_give_the_same_text(api: Caller) -> None:
    plain = texts(complete(api))[0]
    echoed = complete(api, echo=True, stream=True)

    assert texts(complete(api, echo=True)) == ["my card is" + plain]
    assert "".join(each["choices"][0]["text"] for each in echoed.events) == "my card is" + plain
    assert echoed.events[-1]["choices"][0]["finish_reason"] == "length"


def test_log_probabilities_have_the_older_shape(api: Caller) -> None:
    reply = complete(api, logprobs=2)
    found = reply.json["choices"][0]["logprobs"]

    assert {len(each) for each in found.values()} == {5}
    assert all(len(each) == 2 for each in found["top_logprobs"])
    assert found["text_offset"][0] == 0
    assert found["text_offset"] == sorted(found["text_offset"])


@pytest.mark.parametrize(
    ("change", "words"),
    [({"prompt": []}, "empty"), ({"prompt": [6400]}, "0 to 6399"), ({"prompt": [-1]}, "0 to"),
     ({"prompt": ""}, "no token"), ({"prompt": ["a", 1]}, ""),
     ({"echo": True, "logprobs": 1}, "echo"),
     ({"suffix": "x"}, ""), ({"best_of": 3}, "best_of"), ({"prompt": ["a"] * 17}, "more than 16"),
     ({"prompt": "x " * 600}, "512 tokens")],
)  # fmt: skip
def test_wrong_completions_are_refused(api: Caller, change: dict[str, Any], words: str) -> None:
    reply = complete(api, **change)

    assert reply.status == 400
    assert words in reply.error["message"]


def embed(api: Caller, **more: Any) -> Reply:
    return api.post("/v1/embeddings", {"model": "tiny", "input": "my card is late"} | more)


def test_embeddings_are_the_mean_of_the_last_hidden_states(
    api: Caller, served_model: Path, tokenizer: TextTokenizer
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(served_model)
    ids = tokenizer.tokenizer.encode("my card is late").ids
    with torch.inference_mode():
        hidden = model.eval().model(torch.tensor([ids])).last_hidden_state[0]
    expected = hidden.mean(0).tolist()
    reply = embed(api)
    packed = base64.b64decode(embed(api, encoding_format="base64").json["data"][0]["embedding"])

    assert reply.json["data"][0]["embedding"] == pytest.approx(expected, abs=1e-4)
    assert list(struct.unpack("<64f", packed)) == pytest.approx(expected, abs=1e-4)
    assert reply.json["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 0,
                                   "total_tokens": len(ids)}  # fmt: skip


def test_embeddings_of_several_texts_keep_their_order(api: Caller) -> None:
    whole = embed(api, input=["a long one of several words", "short"]).json["data"]
    alone = embed(api, input="short").json["data"][0]

    assert [each["index"] for each in whole] == [0, 1]
    assert whole[1]["embedding"] == pytest.approx(alone["embedding"], abs=1e-4)
    assert embed(api, input=[]).status == 400
    assert embed(api, dimensions=8).status == 400


def test_models_are_listed_and_told(api: Caller) -> None:
    listed = api.get("/v1/models").json

    assert [each["id"] for each in listed["data"]] == ["tiny"]
    assert api.get("/v1/models/tiny").json == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 512
    assert api.get("/v1/models/other").status == 404


def test_metrics_count_what_was_done(api: Caller) -> None:
    api.chat()
    api.get("/nothing")
    text = api.get("/metrics").text
    lines = dict(each.rsplit(" ", 1) for each in text.splitlines() if not each.startswith("#"))

    post = 'mst_requests_total{method="POST",route="/v1/chat/completions",status="200"}'
    assert lines[post] == "1"
    assert lines['mst_requests_total{method="GET",route="other",status="404"}'] == "1"
    assert lines['mst_tokens_total{kind="completion"}'] == "6"
    assert lines["mst_first_token_seconds_count"] == "1"
    assert lines['mst_request_seconds_bucket{le="+Inf"}'] == "1"
    assert int(lines["mst_engine_generated_tokens_total"]) >= 6
    assert all(float(each) >= 0 for each in lines.values())


def test_the_document_describes_what_is_answered(api: Caller) -> None:
    document = api.get("/openapi.json").json

    def check(reply: Reply, path: str, method: str, status: str = "200") -> None:
        content = document["paths"][path][method]["responses"][status]["content"]
        schema = content["application/json"]["schema"] | {"components": document["components"]}
        jsonschema.validate(reply.json, schema)

    tools = [{"type": "function", "function": {"name": "f"}}]
    forced = {"type": "function", "function": {"name": "f"}}
    check(api.chat(logprobs=True, top_logprobs=2), "/v1/chat/completions", "post")
    check(api.chat(tools=tools, tool_choice=forced, max_tokens=64), "/v1/chat/completions", "post")
    check(api.chat(n=0), "/v1/chat/completions", "post", "400")
    check(complete(api, logprobs=1), COMPLETIONS, "post")
    check(embed(api), "/v1/embeddings", "post")
    for path in ("/v1/models", "/health", "/ready"):
        check(api.get(path), path, "get")
    check(api.get("/v1/models/tiny"), "/v1/models/{id}", "get")
    check(api.get("/v1/models/none"), "/v1/models/{id}", "get", "404")
    request = document["components"]["schemas"]["ChatRequest"]
    jsonschema.validate(
        {"model": "tiny", "messages": HELLO}, request | {"components": document["components"]}
    )
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": "tiny"}, request | {"components": document["components"]})


def test_head_is_answered_as_get(api: Caller) -> None:
    assert api.call("HEAD", "/health", b"", {}).status == 200
