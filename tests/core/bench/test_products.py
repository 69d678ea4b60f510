"""What is measured of a server: answers of one length, whatever the model would say."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.measured_cells import cell

from mst.bench import products
from mst.bench.chat_clients import Answer, Question
from mst.bench.products import serve_target, served_of
from mst.bench.run_cell import Place
from mst.data.rows import Message
from mst.data.template import load_template, render
from mst.data.tokens import load_tokenizer
from mst.probe import machine_facts
from mst.registry import load

ASKED = Question([{"role": "user", "content": "hello"}], 8)
TOKENS = 12


def test_answers_that_are_lost_or_too_short_are_told_of() -> None:
    answers = [
        Answer(ASKED, tokens=8, first_token_seconds=0.5),
        Answer(ASKED, tokens=1, first_token_seconds=1.5),
        Answer(ASKED, fault="cut short"),
    ]
    found = served_of("run", 3, answers, 2.0)
    full = served_of("run", 1, answers[:1], 2.0)

    assert found.reason == "cut short, 1 of 2 answers were shorter than what was asked for"
    assert (found.requests, found.lost, found.answer_tokens) == (3, 1, 9)
    assert (found.tokens_per_second, found.first_token_seconds) == (4.5, 1.0)
    assert full.reason == ""


@pytest.fixture
def speechless(tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose likeliest answer is none: after a prompt it ends at once."""
    import torch
    from transformers import AutoModelForCausalLM

    path = shutil.copytree(tiny_model, tmp_path / "speechless")
    tokenizer, template = load_tokenizer(path), load_template(path, None)
    text = render(template, (Message("user", "Hello"),), add_generation_prompt=True)
    untyped: Any = AutoModelForCausalLM
    model = untyped.from_pretrained(path, tie_word_embeddings=False).eval()
    ids = torch.tensor([tokenizer.encode(text).ids])
    with torch.inference_mode():
        last = model.model(input_ids=ids).last_hidden_state[0, -1]
    end = tokenizer.eos_token_ids[0]
    with torch.no_grad():
        model.lm_head.weight[end] = last * 20 / (last @ last)
    assert model(input_ids=ids).logits[0, -1].argmax() == end
    model.save_pretrained(path)
    return path


def test_a_model_that_ends_at_once_is_measured_by_whole_answers(
    speechless: Path, tmp_path: Path
) -> None:
    registry = load()
    place = Place(
        tmp_path, machine_facts(registry), registry, os.environ, (), lambda *_: (None, "")
    )
    asked = cell(serving=(1, 2), prompt_words=4, answer_tokens=TOKENS, timeout_seconds=120.0)
    found = serve_target(asked, place, speechless, "run", tmp_path / "log")

    assert [(each.streams, each.reason, each.lost) for each in found] == [(1, "", 0), (2, "", 0)]
    assert all(each.answer_tokens == TOKENS * each.requests for each in found)
    for each in found:
        assert each.tokens_per_second is not None
        assert each.first_token_seconds is not None
        # Two requests a stream: the first token is not the whole answer.
        assert each.first_token_seconds < TOKENS * each.requests / each.tokens_per_second / 2


def test_an_engine_that_takes_no_bias_is_asked_without(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def server(*_: object) -> Iterator[int]:
        yield 1

    def ask_together(
        port: int, model: str, streams: list[list[Question]], **_: object
    ) -> tuple[list[list[Answer]], float]:
        faults = {True: "HTTP 400", False: ""}
        told = [
            [Answer(one, tokens=3, fault=faults[bool(one.never)]) for one in each]
            for each in streams
        ]
        return told, 1.0

    monkeypatch.setattr(products, "_server", server)
    monkeypatch.setattr(products, "ask_together", ask_together)
    asked = cell(serving=(1,), answer_tokens=TOKENS)
    place: Any = None
    (found,) = serve_target(asked, place, tiny_model, "turbomind", tmp_path / "log")

    assert (found.lost, found.tokens_per_second) == (0, 6.0)
    assert found.reason == "2 of 2 answers were shorter than what was asked for"
