"""Completions, embeddings, models, metrics and the OpenAPI document."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
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


@pytest.fixture(scope="module")
def expected_logprobs(served_model: Path) -> Callable[[list[int]], Any]:
    """Return a function that computes all log-probabilities of tokens offline."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(served_model)
    model.eval()

    def compute(ids: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    return compute


def test_an_echoed_prompt_has_its_log_probabilities(
    api: Caller, tokenizer: TextTokenizer, expected_logprobs: Callable[[list[int]], Any]
) -> None:
    ids = tokenizer.tokenizer.encode("my card is late and the fee is high").ids
    choice = complete(api, prompt=ids, echo=True, logprobs=2, max_tokens=0).json["choices"][0]
    found, logprobs = choice["logprobs"], expected_logprobs(ids)
    own = [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]
    streamed = complete(api, prompt=ids, echo=True, logprobs=2, max_tokens=0, stream=True).events

    assert (choice["text"], choice["finish_reason"]) == (tokenizer.decode(ids), "length")
    assert "".join(found["tokens"]) == choice["text"]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)
    likeliest = [max(each.values()) for each in found["top_logprobs"][1:]]
    assert likeliest == pytest.approx(logprobs[:-1].max(-1).values.tolist(), abs=1e-4)
    assert [choice["text"][at : at + 3] for at in found["text_offset"]] == [
        choice["text"][len("".join(found["tokens"][:place])) :][:3] for place in range(len(ids))
    ]
    assert streamed[0]["choices"][0]["logprobs"] == found


def test_the_requests_of_lm_evaluation_harness_are_answered(
    api: Caller, tokenizer: TextTokenizer, expected_logprobs: Callable[[list[int]], Any]
) -> None:
    """As `lm_eval.models.openai_completions.LocalCompletionsAPI` of 0.4 sends and reads them."""
    contexts = [tokenizer.tokenizer.encode(each).ids for each in ("my card is", "the fee")]
    following = tokenizer.tokenizer.encode(" late").ids
    payload = {"model": "tiny", "prompt": [each + following for each in contexts], "temperature": 0,
               "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}  # fmt: skip
    choices = api.post(COMPLETIONS, payload).json["choices"]
    # Also where the token that is written ends the text, there is one behind the prompt's.
    ended = api.post(COMPLETIONS, payload | {"logit_bias": {"2": 100}}).json["choices"]

    assert {each["finish_reason"] for each in ended} == {"stop"}
    for context, choice, other in zip(contexts, choices, ended, strict=True):
        logprobs = expected_logprobs(context + following)
        places = range(len(context) - 1, len(context) + len(following) - 1)
        total = sum(float(logprobs[at, token]) for at, token in zip(places, following, strict=True))
        greedy = all(int(logprobs[at].argmax()) == token
                     for at, token in zip(places, following, strict=True))  # fmt: skip
        for each in (choice, other):
            told = each["logprobs"]["token_logprobs"][len(context) : -1]
            top = each["logprobs"]["top_logprobs"][len(context) : -1]

            assert sum(told) == pytest.approx(total, abs=1e-4)
            assert all(a == max(b.values()) for a, b in zip(told, top, strict=True)) == greedy


def test_biases_and_penalties_change_what_is_chosen(api: Caller, tokenizer: TextTokenizer) -> None:
    wanted = tokenizer.tokenizer.encode(" late").ids[0]
    word = tokenizer.decode([wanted])

    assert texts(complete(api, logit_bias={str(wanted): 100})) == [word * 5]
    penalized = complete(api, logit_bias={str(wanted): 3.0}, frequency_penalty=2.0, max_tokens=20)
    biased = complete(api, logit_bias={str(wanted): 3.0}, max_tokens=20)
    assert texts(penalized)[0].count(word) < max(2, texts(biased)[0].count(word))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"prompt": []}, "empty"), ({"prompt": [6400]}, "0 to 6399"), ({"prompt": [-1]}, "0 to"),
     ({"prompt": ""}, "no token"), ({"prompt": ["a", 1]}, ""),
     ({"max_tokens": 0}, "goes with echo"),
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
    # Read as the schema of each event, one of a whole body would refuse every stream.
    streamed = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert streamed["text/event-stream"] == {}
    request = document["components"]["schemas"]["ChatRequest"]
    jsonschema.validate(
        {"model": "tiny", "messages": HELLO}, request | {"components": document["components"]}
    )
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": "tiny"}, request | {"components": document["components"]})


def test_head_is_answered_as_get(api: Caller) -> None:
    assert api.call("HEAD", "/health", b"", {}).status == 200
