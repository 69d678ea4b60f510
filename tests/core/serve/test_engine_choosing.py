"""How tokens are chosen: each answer by its own settings, whatever is beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.serve.conftest import Start, ask, random_ids, transformers_answer

from mst.data.tokens import load_tokenizer
from mst.serve.answers import Answer
from mst.serve.choosing import choose
from mst.serve.constraint import Constrainer
from mst.serve.engine import Choice, Prompt, SchemaRefused

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "mark": {"enum": ["good", "bad"]}},
    "required": ["ok", "mark"],
    "additionalProperties": False,
}


def test_the_same_seed_draws_the_same_whatever_is_beside_it(llama: Any, start: Start) -> None:
    engine = start(llama, batch=6)
    ids = random_ids(9, 0)
    drawn: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95}
    alone = ask(engine, ids, 16, seed=3, **drawn).ids()
    others = [ask(engine, random_ids(5 + each, each), 30, seed=each, **drawn) for each in range(4)]
    beside = ask(engine, ids, 16, seed=3, **drawn)
    other_seed = ask(engine, ids, 16, seed=4, **drawn)

    assert beside.ids() == alone
    assert other_seed.ids() != alone
    assert len({tuple(each.ids()) for each in others}) == 4


def drawn(logits: torch.Tensor, seed: int, **choice: Any) -> int:
    answer = Answer(1, Prompt((1,), Choice(1, seed=seed, **choice)), lambda _: None, room=1)
    (chosen,) = choose(logits[None], [answer])
    return int(chosen.id)  # type: ignore[union-attr]


def test_penalties_and_biases_are_openais(llama: Any, start: Start) -> None:
    ids, bias = random_ids(9, 3), {7: 1.5, 11: -100.0, 10**6: 100.0}
    presence, frequency = 0.4, 0.3
    answer: list[int] = []
    for _ in range(24):
        with torch.inference_mode():
            logits = llama(torch.tensor([ids + answer])).logits[0, -1].tolist()
        for token in range(len(logits)):
            count = answer.count(token)
            logits[token] -= count * frequency + (count > 0) * presence
            logits[token] += bias.get(token, 0.0)
        answer.append(logits.index(max(logits)))
    engine = start(llama)
    given: dict[str, Any] = {"presence_penalty": presence, "frequency_penalty": frequency}
    penalized = ask(engine, ids, 24, logit_bias=tuple(bias.items()), **given)
    beside = ask(engine, ids, 24)

    assert penalized.ids() == answer
    assert beside.ids() == transformers_answer(llama, ids, 24) != answer


@pytest.mark.parametrize("top_p", [1.0, 0.999999])
def test_draws_follow_the_probabilities(top_p: float) -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    found = [drawn(probabilities.log() * 2, seed, temperature=2.0, top_p=top_p)
             for seed in range(2000)]  # fmt: skip
    shares = torch.bincount(torch.tensor(found), minlength=4) / len(found)

    assert shares[1] == 0
    # Six standard deviations of a share of 0.5 among 2000 are 0.067.
    assert (shares - probabilities).abs().max() < 0.067


@pytest.mark.parametrize("vocabulary", [50, 5000])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(vocabulary: int) -> None:
    # All alike: half of the probability is half of the tokens, more than are looked at at first.
    logits = torch.zeros(vocabulary)
    logits[: vocabulary // 2] += 1e-3
    found = {drawn(logits, seed, top_p=0.5) for seed in range(500)}
    peaked = torch.zeros(vocabulary)
    peaked[7] = 20

    assert max(found) < vocabulary // 2
    assert len(found) > 20
    assert {drawn(peaked, seed, top_p=0.9) for seed in range(50)} == {7}
    assert {drawn(logits, seed, temperature=0.0) for seed in range(5)} == {0}
    # Below what float32 holds.
    assert {drawn(peaked, seed, temperature=1e-46) for seed in range(5)} == {7}
    assert {drawn(peaked, seed, top_p=1e-46) for seed in range(5)} == {7}


def test_log_probabilities_are_those_of_the_models_logits(llama: Any, start: Start) -> None:
    engine = start(llama)
    ids = random_ids(7, 1)
    asked = ask(engine, ids, 5, temperature=0.7, seed=1, top_logprobs=3)
    only_chosen = ask(engine, ids, 5, temperature=0.7, seed=1, top_logprobs=0)
    without = ask(engine, ids, 5)
    tokens = asked.tokens()
    answer = [each.id for each in tokens]
    with torch.inference_mode():
        logits = llama(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1)

    for each, row in zip(tokens, expected, strict=True):
        values, names = row.topk(3)
        assert each.logprob == pytest.approx(float(row[each.id]), abs=1e-4)
        assert [token for token, _ in each.top] == names.tolist()
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert [each.logprob for each in only_chosen.tokens()] == [each.logprob for each in tokens]
    assert all(each.logprob is None and each.top == () for each in without.tokens())


def test_an_answer_ends_at_a_stop_token_or_its_length(llama: Any, start: Start) -> None:
    engine = start(llama)
    ids = random_ids(9, 2)
    whole = transformers_answer(llama, ids, 12)
    end = whole[5]
    stopped = ask(engine, ids, 12, stop_ids=frozenset({end})).tokens()
    cut = ask(engine, ids, 3).tokens()
    near_the_end = ask(engine, random_ids(250, 3), 100).tokens()

    assert [each.id for each in stopped] == whole[: whole.index(end) + 1]
    assert [each.finish for each in stopped] == [None] * whole.index(end) + ["stop"]
    assert [each.finish for each in cut] == [None, None, "length"]
    assert len(near_the_end) == 256 - 250


@pytest.fixture(scope="module")
def talker(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def test_an_answer_fits_its_schema_and_the_others_are_free(
    talker: Any, tokenizer: Any, start: Start
) -> None:
    constrainer = Constrainer(tokenizer.tokenizer, tokenizer.eos_token_ids, 6400)
    engine = start(talker, constrainer=constrainer)
    stop = frozenset(tokenizer.eos_token_ids)
    ids = tokenizer.encode("is it good?").ids
    free = ask(engine, ids, 20)
    bound = [
        ask(engine, ids, 60, temperature=1.0, seed=seed, stop_ids=stop,
            json_schema=json.dumps(SCHEMA))
        for seed in range(3)
    ]  # fmt: skip
    greedy = ask(engine, ids, 60, stop_ids=stop, json_schema=json.dumps(SCHEMA), top_logprobs=0)
    without_stop = ask(engine, ids, 60, json_schema=json.dumps(SCHEMA))

    assert free.ids() == transformers_answer(talker, ids, 20)
    for heard in (*bound, greedy, without_stop):
        tokens = heard.tokens()
        found = json.loads(tokenizer.decode([each.id for each in tokens[:-1]]))
        assert tokens[-1].finish == "stop"
        assert tokens[-1].id in stop
        assert isinstance(found["ok"], bool)
        assert found["mark"] in ("good", "bad")


def test_no_schema_but_any_object(talker: Any, tokenizer: Any, start: Start) -> None:
    constrainer = Constrainer(tokenizer.tokenizer, tokenizer.eos_token_ids, 6400)
    engine = start(talker, constrainer=constrainer)
    first = ask(engine, [5, 6], 1, json_schema="{}").ids()

    assert tokenizer.decode(first).lstrip().startswith("{")


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ("{", "is no JSON"),
        ("[]", "no JSON object"),
        ('{"type": "nothing"}', "can't constrain"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ],
)
def test_a_refused_schema_is_one_prompts_error(
    schema: str, why: str, talker: Any, tokenizer: Any, start: Start
) -> None:
    constrainer = Constrainer(tokenizer.tokenizer, tokenizer.eos_token_ids, 6400)
    engine = start(talker, constrainer=constrainer)
    beside = ask(engine, [5, 6], 20)

    with pytest.raises(SchemaRefused, match=why):
        ask(engine, [5, 6], 20, json_schema=schema)
    assert len(beside.ids()) == 20
