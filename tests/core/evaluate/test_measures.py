"""Losses are transformers' own, answers do not depend on the batch, and passes fit into memory."""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mst.data.encode import Example, encode
from mst.data.formats import read
from mst.data.labels import label_set
from mst.data.rows import Message
from mst.data.template import load_template
from mst.data.tokens import load_tokenizer
from mst.evaluate.answers import greedy_answers
from mst.evaluate.batching import batches, in_passes, token_budget
from mst.evaluate.labels import (
    answer_tokens,
    label_accuracy,
    label_answers,
    questions,
    restricted_answers,
)
from mst.evaluate.likelihood import row_losses
from mst.model.facts import read_facts

PROMPTS = [[1, 320, 275, 201], [1, 99], [1, 7, 7, 1200, 99, 320, 5000, 17, 44], [1, 5000, 6]]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    return loaded.eval()


@pytest.fixture(scope="module")
def examples(tiny_model: Path, chat_rows: Path) -> tuple[Example, ...]:
    rows = read([str(chat_rows)]).rows
    return tuple(encode(rows, load_tokenizer(tiny_model), load_template(tiny_model), 64).examples)


def losses(model: Any, examples: Any, rows: int = 7, tokens: int = 10_000) -> Any:
    import torch

    return row_losses(model, examples, 0, torch.float32, rows, tokens)


def test_each_rows_loss_is_transformers_own(model: Any, examples: tuple[Example, ...]) -> None:
    import torch

    for (total, tokens), each in zip(losses(model, examples), examples, strict=True):
        ids, labels = torch.tensor([list(each.input_ids)]), torch.tensor([list(each.labels)])
        with torch.inference_mode():
            own = float(model(input_ids=ids, labels=labels).loss)

        assert tokens == sum(label >= 0 for label in each.labels)
        assert total / tokens == pytest.approx(own, rel=1e-4)


def test_weights_of_tokens_weigh_loss_and_count(model: Any, examples: tuple[Example, ...]) -> None:
    plain, doubled = examples[0], examples[1]
    weighted = replace(doubled, weights=array("d", [2.0] * len(doubled.input_ids)))
    before, after = losses(model, [plain, doubled]), losses(model, [plain, weighted])

    assert after[0] == pytest.approx(before[0])
    assert after[1] == pytest.approx([2 * each for each in before[1]], rel=1e-5)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 10_000), (4, 10_000), (4, 40)])
def test_answers_in_a_batch_are_those_of_generate_alone(model: Any, rows: int, tokens: int) -> None:
    import torch

    alone = []
    for prompt in PROMPTS:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        alone.append(out[0, len(prompt) :].tolist())
    stop = [alone[1][5], alone[2][2]]
    expected = [
        each[: min([each.index(token) for token in stop if token in each], default=12)]
        for each in alone
    ]
    room = [12, 12, 12, 3]
    expected[3] = expected[3][:3]
    found = greedy_answers(model, PROMPTS, stop, 0, torch.float32, room, rows, tokens)

    assert found == expected
    assert {len(each) for each in found} != {12}


def test_a_models_own_sampling_is_left_alone_and_not_used(model: Any) -> None:
    import torch

    arguments = (PROMPTS, [2], 0, torch.float32, [6] * 4, 4, 10_000)
    plain = greedy_answers(model, *arguments)
    own = model.generation_config
    model.generation_config = type(own)(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    mine = model.generation_config
    try:
        assert greedy_answers(model, *arguments) == plain
        assert model.generation_config is mine
    finally:
        model.generation_config = own


def test_label_answers_are_in_the_order_of_their_rows(
    model: Any, tiny_model: Path, chat_rows: Path
) -> None:
    import torch

    rows = read([str(chat_rows)]).rows
    names = label_set(rows)
    tokenizer, template = load_tokenizer(tiny_model), load_template(tiny_model)

    assert names is not None
    arguments = (names, tokenizer, template, torch.float32)
    each = [label_answers(model, [row], *arguments)[0] for row in rows[:9]]
    together = label_answers(model, rows[:9], *arguments, rows_at_most=4)
    share = label_accuracy(model, rows[:9], *arguments)
    chosen = restricted_answers(model, rows[:9], *arguments)

    assert together == each
    assert chosen == [one.restricted for one in each]
    assert share.restricted == pytest.approx(sum(one.restricted for one in each) / 9)


def test_the_restricted_answer_is_the_likeliest_of_the_whole_set(
    model: Any, tiny_model: Path, chat_rows: Path
) -> None:
    import torch

    rows = read([str(chat_rows)]).rows
    names = label_set(rows)
    tokenizer, template = load_tokenizer(tiny_model), load_template(tiny_model)

    assert names is not None
    choices = answer_tokens(rows[0], names, tokenizer, template)
    likeliest = []
    for row, asked in zip(rows[:7], questions(rows[:7], tokenizer, template), strict=True):
        scores = []
        for choice in choices:
            ids = torch.tensor([[*asked.prompt, *choice]])
            with torch.inference_mode():
                logs = model(input_ids=ids).logits[0, -len(choice) - 1 : -1].log_softmax(-1)
            scores.append(float(logs.gather(1, torch.tensor(choice)[:, None]).sum()))
        best = names[scores.index(max(scores))]
        likeliest.append(replace(row, messages=(*row.messages[:-1], Message("assistant", best))))
    found = label_answers(model, likeliest, names, tokenizer, template, torch.float32)

    assert all(each.restricted for each in found)


def test_the_output_head_reads_copies_of_what_it_needs(
    model: Any, tiny_model: Path, chat_rows: Path
) -> None:
    import torch

    rows = read([str(chat_rows)]).rows[:3]
    names, tokenizer = label_set(read([str(chat_rows)]).rows), load_tokenizer(tiny_model)
    seen: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        assert names is not None
        label_answers(model, rows, names, tokenizer, load_template(tiny_model), torch.float32)
        greedy_answers(model, PROMPTS, [2], 0, torch.float32, [6] * 4, 4, 10_000)
    finally:
        hook.remove()

    # Of a view torch multiplies row by row, with the head's weights repeated for each.
    # One row is what all prompts begin with, read apart.
    assert {each.shape[0] for each in seen} == {1, 3, 4}
    assert all(each.is_contiguous() for each in seen)


def test_batches_hold_each_row_once_within_their_limits() -> None:
    lengths = [5, 40, 7, 7, 100, 3, 8, 8, 8]
    found = batches(lengths, rows_at_most=3, tokens_at_most=24)

    assert sorted(place for batch in found for place in batch) == list(range(9))
    assert found[0] == [4]
    assert all(len(batch) <= 3 for batch in found)
    assert all(len(b) == 1 or max(lengths[p] for p in b) * len(b) <= 24 for b in found)


def test_a_pass_that_does_not_fit_is_halved() -> None:
    import torch

    seen = []

    def work(places: list[int]) -> list[int]:
        seen.append(len(places))
        if len(places) > 2:
            raise torch.OutOfMemoryError
        return [10 * place for place in places]

    found = dict.fromkeys(range(5), 0)
    for places, results in in_passes(torch.device("cpu"), [[0, 1, 2, 3], [4]], work):
        found |= zip(places, results, strict=True)

    assert found == {0: 0, 1: 10, 2: 20, 3: 30, 4: 40}
    assert seen == [4, 2, 2, 1]

    def never(places: list[int]) -> list[int]:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        list(in_passes(torch.device("cpu"), [[0, 1]], never))


def test_a_smaller_device_takes_fewer_tokens(tiny_model: Path) -> None:
    facts = read_facts(tiny_model)
    large, small = token_budget(facts, 8 << 30, 2), token_budget(facts, 1 << 30, 2)

    assert large[0] > small[0] > 1000
    assert large[1] > large[0]
    assert token_budget(facts, 0, 2) == (0, 0)
    assert not any(math.isinf(each) for each in token_budget(facts, None, 4))
    assert json.dumps(batches([9, 9], 16, 0)) == "[[0], [1]]"
