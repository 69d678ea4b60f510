"""Answers that are computed together are those that transformers gives to each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.core.serve.conftest import (
    CONTEXT,
    CPU,
    Gate,
    Start,
    ask,
    random_ids,
    random_model,
    transformers_answer,
)
from transformers import LlamaForCausalLM

from mst.errors import ModelError
from mst.serve.asking import way_of
from mst.serve.decoders import AloneDecoder, BatchedDecoder, Served
from mst.serve.row_adapters import RowAdapters

# Windows are shorter than the prompts. Attention with a soft cap, and ALiBi, have no fused kernel.
TOGETHER: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 6, "attention": "eager"},
    "gemma3_text": {"sliding_window": 6, "num_hidden_layers": 6},
    "mistral": {"sliding_window": 6},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {},
    "olmo2": {},
    "mixtral": {},
    "bloom": {"attention": "eager"},
}
ALONE: dict[str, dict[str, Any]] = {
    "mamba": {"attention": "eager"},
    "lfm2": {"num_hidden_layers": 4, "full_attn_idxs": [1, 3]},
}
LENGTHS = (3, 30, 9, 60, 12, 5)


def way(model: Any, context: int = CONTEXT) -> Any:
    return way_of(Served(model, CPU, torch.float32, RowAdapters(model)), context)


def answers_are_those_of_transformers(start: Start, model: Any) -> None:
    # At most 24 tokens of prompts a step: some come in one pass, some piece by piece, and while
    # the first answer runs the others join and leave.
    engine = start(model, batch=4, prefill_tokens=24)
    prompts = [random_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    first = ask(engine, prompts[0], 40)
    told = [first.next().id, first.next().id]
    others = [ask(engine, ids, 6 + 3 * place) for place, ids in enumerate(prompts[1:])]
    found = [told + first.ids(), *(each.ids() for each in others)]

    assert found[0] == transformers_answer(model, prompts[0], 40)
    for place, ids in enumerate(prompts[1:]):
        assert found[place + 1] == transformers_answer(model, ids, 6 + 3 * place)


@pytest.mark.parametrize("kind", TOGETHER)
def test_answers_in_one_batch_are_those_of_transformers(kind: str, start: Start) -> None:
    model = random_model(kind, **TOGETHER[kind])

    assert isinstance(way(model).decoder, BatchedDecoder), way(model).reason
    answers_are_those_of_transformers(start, model)


@pytest.mark.parametrize("kind", ALONE)
def test_models_with_states_answer_one_by_one(kind: str, start: Start) -> None:
    model = random_model(kind, **ALONE[kind])

    assert isinstance(way(model).decoder, AloneDecoder)
    assert "LinearAttentionLayer" in str(way(model).reason)
    answers_are_those_of_transformers(start, model)


class Unmasked(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """A model that does not heed which tokens are padding."""

    def forward(self, attention_mask: Any = None, **arguments: Any) -> Any:
        return super().forward(**arguments)


class Forgetful(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """A model whose cache is of no use to it."""

    def forward(self, past_key_values: Any = None, use_cache: Any = None, **arguments: Any) -> Any:
        return super().forward(use_cache=False, **arguments)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (Unmasked, "in a batch differ from those alone"),
        (Forgetful, "its own cache makes other answers"),
    ],
)
def test_a_model_that_mixes_rows_up_is_found_out(
    broken: Any, why: str, llama: Any, start: Start
) -> None:
    model = broken(llama.config).eval()
    model.load_state_dict(llama.state_dict())
    found = way(model)
    prompts = [random_ids(length, length) for length in (4, 17)]
    engine = start(model)
    heard = [ask(engine, ids) for ids in prompts]

    assert isinstance(found.decoder, AloneDecoder)
    assert why in found.reason
    assert [each.ids() for each in heard] == [
        transformers_answer(llama, ids, 12) for ids in prompts
    ]


class Needy(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """A model that reads no text without pictures."""

    def forward(self, pictures: Any, **arguments: Any) -> Any:
        return super().forward(**arguments)


def test_a_model_that_does_not_go_on_from_text_is_refused(llama: Any) -> None:
    with pytest.raises(ModelError, match=r"\(Needy\) can't go on from text alone"):
        way(Needy(llama.config))


def test_rows_of_other_lengths_do_not_stretch_positions() -> None:
    scaled = {
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = random_model("llama", rope_parameters=scaled)

    assert isinstance(way(model).decoder, AloneDecoder)
    assert "longest row" in way(model).reason
    assert isinstance(way(model, context=64).decoder, BatchedDecoder)


def test_many_answers_take_one_pass_each_step(llama: Any, start: Start, gate: Gate) -> None:
    engine = start(llama, batch=16)
    passes: list[int] = []
    handle = llama.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        gate.shut()
        heard = [ask(engine, random_ids(8, seed), 20) for seed in range(16)]
        gate.open()
        [each.ids() for each in heard]
    finally:
        handle.remove()

    assert max(passes) == 16
    assert len(passes) < 2 * 20 + 16
    assert engine.figures().generated_tokens == 16 * 20


def test_memory_stays_flat_while_answers_come_and_go(llama: Any, start: Start) -> None:
    engine = start(llama, batch=4, prefix_bytes=0)
    most = 0
    for turn in range(12):
        heard = [ask(engine, random_ids(20 + each, turn + each), 30) for each in range(4)]
        heard[0].next()
        most = max(most, engine.figures().cache_bytes)
        [each.ids() for each in heard]
    # Two layers' keys and values, two heads of 8 float32, 4 rows of at most 128 columns.
    whole = 2 * 2 * 2 * 8 * 4 * 4 * 128

    assert 0 < most <= whole
    assert engine.figures().cache_bytes == 0
