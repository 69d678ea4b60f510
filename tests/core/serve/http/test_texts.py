"""Text of an answer: whole characters, stop texts and calls of tools, however the tokens fall."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mst.data.tokens import TextTokenizer
from mst.serve.http.texts import Decoder, Held
from mst.serve.http.token_text import token_bytes
from mst.serve.http.tool_calls import Watch, calls_in


@given(
    text=st.text("ab<c", max_size=20),
    marks=st.lists(st.text("ab<c", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_a_mark_is_found_however_the_text_is_cut(
    text: str, marks: list[str], cuts: list[int]
) -> None:
    held = Held(marks)
    places = sorted({0, len(text), *(each for each in cuts if each < len(text))})
    shown = "".join(held.push(text[start:end]) for start, end in pairwise(places))
    met = [(text.find(each) + len(each), text.find(each)) for each in marks if each in text]
    if met:
        assert shown == text[: min(met)[1]]
    else:
        assert held.found is None
        assert shown + held.rest() == text


def test_text_that_may_become_a_mark_is_held_back() -> None:
    held = Held(("STOP",))

    assert [held.push(each) for each in ("a S", "T", "x ST", "OP b")] == ["a ", "", "STx ", ""]
    assert (held.found, held.rest()) == ("STOP", " b")


def test_tokens_become_the_text_that_they_came_from(tokenizer: TextTokenizer) -> None:
    text = "naïve 🦜 王小明, “ok” end"
    ids = tokenizer.encode(text).ids
    decoder = Decoder(tokenizer.tokenizer)
    pieces = [decoder.push(each) for each in ids]

    assert "".join(pieces) == text
    assert b"".join(token_bytes(tokenizer.tokenizer, each) for each in ids).decode() == text
    assert "\ufffd" not in "".join(pieces)
    assert decoder.push(2) == ""


def test_bytes_of_sentencepiece_and_added_tokens(tokenizer: TextTokenizer) -> None:
    from tokenizers import Tokenizer, decoders, models

    piece = "\u2581word"
    other = Tokenizer(models.BPE({"<0xE2>": 0, piece: 1}, []))
    other.decoder = decoders.ByteFallback()
    end = tokenizer.eos_token_ids[0]

    assert token_bytes(other, 0) == b"\xe2"
    assert token_bytes(other, 1) == b" word"
    assert token_bytes(other, 99) == b""
    assert token_bytes(tokenizer.tokenizer, end).decode() == tokenizer.tokenizer.id_to_token(end)


def call(name: str = "f", **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


@pytest.mark.parametrize(
    ("text", "rest", "found"),
    [
        (f"<tool_call>\n{call(a=1)}\n</tool_call>", "", [("f", {"a": 1})]),
        (f"Let me look. <tool_call>{call(a=1)}</tool_call>\n<tool_call>{call('g')}</tool_call>",
         "Let me look.", [("f", {"a": 1}), ("g", {})]),
        (f"<tool_call>{call(a=1)}", "", [("f", {"a": 1})]),
        (call(a="王"), "", [("f", {"a": "王"})]),
        (f"[{call()}, {call('g')}]", "", [("f", {}), ("g", {})]),
        (f"```json\n{call(a=1)}\n```", "", [("f", {"a": 1})]),
        ('{"name": "f", "parameters": {"b": 2}}', "", [("f", {"b": 2})]),
        ('{"name": "f", "arguments": "{\\"b\\": 2}"}', "", [("f", {"b": 2})]),
        (call("unknown"), call("unknown"), []),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ('{"name": ["f"], "arguments": {}}', '{"name": ["f"], "arguments": {}}', []),
        ('{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": [1]}', []),
        ("[" * 100_000, "[" * 100_000, []),
        ("[]", "[]", []),
        ("no call at all", "no call at all", []),
    ],
)  # fmt: skip
def test_calls_are_found_in_what_models_write(
    text: str, rest: str, found: list[tuple[str, dict[str, Any]]]
) -> None:
    left, calls = calls_in(text, {"f", "g"})

    assert left == rest
    assert [(each.name, json.loads(each.arguments)) for each in calls] == found
    assert len({each.id for each in calls}) == len(calls)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_shows_text_and_keeps_calls_for_the_end(size: int) -> None:
    def streamed(text: str) -> tuple[str, str, int]:
        watch = Watch()
        shown = "".join(watch.push(text[at : at + size]) for at in range(0, len(text), size))
        rest, calls = watch.end({"f"})
        return shown, rest, len(calls)

    assert streamed(f"Look: <tool_call>{call()}</tool_call>") == ("Look: ", "", 1)
    assert streamed(call(a=1)) == ("", "", 1)
    assert streamed("plain < text") == ("plain < text", "", 0)
    assert streamed('{"answer": 1}') == ("", '{"answer": 1}', 0)
    assert streamed("ends in <tool") == ("ends in ", "<tool", 0)
