"""What is kept of a conversation saves computing, and never helps another caller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.core.serve.conftest import Start, ask, random_ids, random_model, transformers_answer

from mst.serve.engine import Choice, Prompt
from mst.serve.prefix_cache import PrefixCache


def computed(model: Any, counts: list[int]) -> Any:
    """Count the columns of every pass."""
    return model.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )


# The window is shorter than what is kept.
@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("mistral", {"sliding_window": 7})])
def test_a_second_turn_computes_only_its_new_tokens(
    kind: str, options: dict[str, Any], start: Start
) -> None:
    model = random_model(kind, **options)
    engine = start(model)
    first = random_ids(60, 1)
    answer = ask(engine, first, 10).ids()
    second = [*first, *answer, *random_ids(9, 2)]
    counts: list[int] = []
    handle = computed(model, counts)
    try:
        tokens = ask(engine, second, 5).tokens()
    finally:
        handle.remove()

    assert [each.id for each in tokens] == transformers_answer(model, second, 5)
    # The answer's last token was told and not computed.
    assert {each.cached for each in tokens} == {60 + 10 - 1}
    assert counts == [10, 1, 1, 1, 1]
    figures = engine.figures()
    assert figures.cached_tokens == 69
    assert figures.prompt_tokens == 60 + 79


def test_turns_of_other_lengths_go_on_side_by_side(llama: Any, start: Start) -> None:
    engine = start(llama, prefill_tokens=64)
    first = [random_ids(length, length) for length in (40, 7, 25)]
    answers = [each.ids() for each in [ask(engine, ids, 6) for ids in first]]
    second = [
        [*ids, *answer, *random_ids(3 + 5 * place, 50 + place)]
        for place, (ids, answer) in enumerate(zip(first, answers, strict=True))
    ]
    second.append(random_ids(11, 70))
    running = ask(engine, random_ids(5, 80), 60)
    running.next()
    heard = [ask(engine, ids, 8) for ids in second]

    assert [each.ids() for each in heard] == [transformers_answer(llama, ids, 8) for ids in second]
    assert engine.figures().cached_tokens > 0


def test_the_same_prompt_again_computes_one_token(llama: Any, start: Start) -> None:
    engine = start(llama)
    ids = random_ids(30, 3)
    once = ask(engine, ids, 4).ids()
    again = ask(engine, ids, 4).tokens()

    assert [each.id for each in again] == once
    assert again[0].cached == 29


def test_nothing_is_shared_between_callers(llama: Any, start: Start) -> None:
    engine = start(llama)
    ids = random_ids(30, 3)
    ask(engine, ids, 4, caller="one").ids()

    assert ask(engine, ids, 4, caller="two").next().cached == 0
    assert ask(engine, ids, 4).next().cached == 0
    assert ask(engine, ids, 4, caller="one").next().cached == 29


def test_without_a_budget_nothing_is_kept(llama: Any, start: Start) -> None:
    engine = start(llama, prefix_bytes=0)
    ids = random_ids(30, 3)
    ask(engine, ids, 4).ids()

    assert ask(engine, ids, 4).next().cached == 0
    assert engine.figures().prefix_bytes == 0


def prompt(caller: str = "", adapter: str | None = None) -> Prompt:
    return Prompt((1,), Choice(1), adapter, caller)


def kept(tokens: int) -> Any:
    """One layer's keys and values: 8 bytes a token."""
    block = torch.arange(2.0 * tokens).reshape(1, 2 * tokens, 1)
    return {0: (block[:, :tokens], block[:, tokens:])}


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = PrefixCache(8 * 25)
    one, two, three = ([number, *range(10, 19)] for number in (1, 2, 3))
    cache.keep(prompt(), one, kept(10))
    cache.keep(prompt(), two, kept(10))
    cache.find(prompt(), [*one, 5])
    cache.keep(prompt(), three, kept(10))
    cache.keep(prompt(), list(range(40)), kept(40))

    assert cache.find(prompt(), [*one, 5])[1] == 10
    assert cache.find(prompt(), [*two, 5])[1] == 0
    assert cache.find(prompt(), [*three, 5])[1] == 10
    assert cache.bytes == 160


def test_a_longer_conversation_takes_the_place_of_its_beginning() -> None:
    cache = PrefixCache(1000)
    ids = list(range(20))
    cache.keep(prompt(), ids[:10], kept(10))
    cache.keep(prompt(), ids, kept(20))
    cache.keep(prompt(), ids[:5], kept(5))

    assert cache.bytes == 160
    found, tokens = cache.find(prompt(), [*ids[:12], 99, 98])
    assert tokens == 12
    assert found is not None
    assert torch.equal(found[0][1], kept(20)[0][1])


def test_adapters_have_their_own() -> None:
    cache = PrefixCache(1000)
    cache.keep(prompt(adapter="a"), [1, 2, 3], kept(3))

    assert cache.find(prompt(adapter="a"), [1, 2, 3, 4])[1] == 3
    assert cache.find(prompt(adapter="b"), [1, 2, 3, 4]) == (None, 0)
    assert cache.find(prompt(), [1, 2, 3, 4]) == (None, 0)


def test_a_kept_copy_does_not_hold_its_block() -> None:
    cache = PrefixCache(1000)
    block = torch.zeros(1, 1000, 1)
    cache.keep(prompt(), [1, 2], {0: (block[:, :2], block[:, 2:4])})
    found, _ = cache.find(prompt(), [1, 2, 3])

    assert found is not None
    assert found[0][0].untyped_storage().nbytes() == 8


def test_what_is_kept_gives_way_to_what_runs() -> None:
    cache, set_apart = PrefixCache(8 * 25, 8 * 40), PrefixCache(8 * 25)
    one, two = ([number, *range(10, 19)] for number in (1, 2))
    for each in (cache, set_apart):
        each.keep(prompt(), one, kept(10))
        each.keep(prompt(), two, kept(10))
        each.give_way(8 * 25)
    kept_bytes = cache.bytes, set_apart.bytes
    cache.give_way(8 * 41)
    cache.keep(prompt(), one, kept(10))
    while_full = cache.bytes
    cache.give_way(0)
    cache.keep(prompt(), one, kept(10))

    # The one that was used longest ago went first.
    assert kept_bytes == (80, 160)
    assert while_full == 0
    assert cache.bytes == 80
