"""Steps without transformers' forward pass: what they give, and where they are left out."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.core.serve.conftest import (
    CONTEXT,
    CPU,
    VOCABULARY,
    Start,
    ask,
    random_ids,
    random_model,
    transformers_answer,
)
from transformers import LlamaForCausalLM

from mst.serve import asking
from mst.serve.answers import Answer
from mst.serve.asking import way_of
from mst.serve.decode_step import step_of
from mst.serve.decoders import BatchedDecoder, Served
from mst.serve.engine import Choice, Prompt
from mst.serve.job import prepare_engine
from mst.serve.loading import load_served
from mst.serve.row_adapters import RowAdapters

_SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
KNOWN: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", **_SCALED}}),
    # These are scaled by band, and YaRN's attention too.
    ("llama", {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, **_SCALED}}),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", **_SCALED}}),
    ("mistral", {"sliding_window": None}),
    ("qwen3", {"head_dim": 16}),
]  # fmt: skip


def next_logits(served: Served, lengths: tuple[int, ...], own_steps: bool) -> torch.Tensor:
    """Return the logits of a step of prompts of these lengths."""
    decoder = BatchedDecoder(served, own_steps)
    answers = []
    for place, length in enumerate(lengths):
        prompt = Prompt(tuple(random_ids(length, place)), Choice(8, temperature=0.0))
        answers.append(Answer(place, prompt, lambda _: None, 8))
    prefill = decoder.begin(answers, [None] * len(answers))
    with torch.inference_mode():
        while decoder.advance(prefill, 256) is None:
            pass
        decoder.join(prefill)
        for each in answers:
            each.ids.append(5)
        return decoder.step()


def served_by(model: Any) -> Served:
    return Served(model, CPU, torch.float32, RowAdapters(model))


@pytest.mark.parametrize(("kind", "options"), KNOWN)
def test_a_step_gives_what_the_forward_pass_gives(kind: str, options: dict[str, Any]) -> None:
    served = served_by(random_model(kind, **options))

    assert served.steps is not None
    for lengths in ((9,), (9, 9), (3, 30, 9)):
        own, usual = (next_logits(served, lengths, own_steps) for own_steps in (True, False))
        torch.testing.assert_close(own, usual, rtol=1e-4, atol=1e-5)


def test_a_single_answer_in_16_bits_is_rounded_as_the_forward_pass_rounds() -> None:
    job = replace(prepare_engine(None, "cpu", os.environ), dtype="bfloat16", threads=1)
    served = load_served(job, CPU)

    assert served.steps is not None
    # As `mst.generate` calls it: torch's attention rounds otherwise beside a mask.
    served._known["attention_mask"] = False
    for length in (40, 134):
        own, usual = (next_logits(served, (length,), own_steps) for own_steps in (True, False))
        assert torch.equal(own, usual)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gemma2", {"attention": "eager"}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("llama", {"attention": "eager"}),
    ],
)
def test_other_forward_passes_are_not_gone_through(kind: str, options: dict[str, Any]) -> None:
    assert step_of(random_model(kind, **options), CPU) is None


def test_a_changed_forward_pass_is_run_as_it_is(llama: Any, start: Start) -> None:
    class Other(LlamaForCausalLM):  # type: ignore[no-untyped-call]
        pass

    other: Any = Other(llama.config)
    doubled = random_model("llama")
    doubled.model.layers[0].register_forward_hook(lambda _, __, out: out * 2)
    found = way_of(served_by(doubled), CONTEXT)
    ids = random_ids(9, 3)

    assert step_of(other, CPU) is None
    assert isinstance(found.decoder, BatchedDecoder)
    assert found.decoder.steps is None
    assert ask(start(doubled), ids).ids() == transformers_answer(doubled, ids, 12)


def test_who_listens_to_passes_hears_every_step(llama: Any, start: Start) -> None:
    engine = start(llama)
    heard: list[int] = []
    handle = llama.register_forward_pre_hook(
        lambda _, __, given: heard.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        answer = ask(engine, random_ids(9, 1), 6).ids()
    finally:
        handle.remove()

    assert heard == [9, 1, 1, 1, 1, 1]
    assert answer == transformers_answer(llama, random_ids(9, 1), 6)
    assert max(answer) < VOCABULARY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_that_hears_little_of_others_may_still_round(dtype: torch.dtype) -> None:
    model = random_model("llama").to(dtype)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.1
    served = Served(model, CPU, torch.float32, RowAdapters(model))
    probes = [asking._probe(served, place, length) for place, length in enumerate((13, 7, 10))]
    expected = torch.stack([asking._whole(served, each) for each in probes])
    heard = (asking._contaminated(served, probes, 0) - expected).abs().mean(-1)
    allowed = asking._allowed(served, probes, expected) / heard

    assert bool((allowed <= 0.5).all())
    assert bool((allowed > 0.2).all()) == (dtype == torch.bfloat16)
