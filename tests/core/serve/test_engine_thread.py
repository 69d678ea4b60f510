"""The engine's thread: what ends an answer beside its own end, and that the others go on."""

from __future__ import annotations

import threading
import time
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

from mst.serve.continuous import ContinuousEngine, Limits
from mst.serve.decoders import BatchedDecoder, Served
from mst.serve.engine import Choice, EngineFailure, Overloaded, Prompt, PromptTooLong
from mst.serve.engine import UnknownAdapter as Unknown
from mst.serve.row_adapters import RowAdapters

SECRET = 77


class Broken:
    """A forward hook on a real model that raises under a condition."""

    def __init__(self, model: Any, when: Any, error: Exception) -> None:
        self.when, self.error, self.raised = when, error, 0
        self.handle = model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, _: Any, args: Any, kwargs: Any) -> None:
        if self.when(kwargs["input_ids"]):
            self.raised += 1
            raise self.error


def test_a_cancelled_answer_ends_and_the_others_go_on(llama: Any, start: Start, gate: Gate) -> None:
    engine = start(llama)
    ids = [random_ids(9, seed) for seed in range(3)]
    heard = [
        ask(engine, each, 200, at_first=gate.shut if place == 1 else None)
        for place, each in enumerate(ids)
    ]
    heard[1].next()
    engine.cancel(heard[1].ticket)
    gate.open()
    others = [heard[0].ids(), heard[2].ids()]

    assert others == [transformers_answer(llama, ids[place], 200) for place in (0, 2)]
    # The pass that was held up told one more at most.
    assert heard[1].news.qsize() <= 1
    figures = engine.figures()
    assert (figures.cancelled, figures.finished, figures.running) == (1, 2, 0)
    engine.cancel(heard[1].ticket)
    engine.cancel(10_000)
    assert ask(engine, ids[0], 4).ids() == others[0][:4]


def test_a_waiting_prompt_can_be_cancelled(llama: Any, start: Start, gate: Gate) -> None:
    engine = start(llama, batch=1)
    running = ask(engine, random_ids(4, 0), 15, at_first=gate.shut)
    running.next()
    waiting = ask(engine, random_ids(4, 1), 5)
    engine.cancel(waiting.ticket)
    gate.open()
    running.ids()
    after = ask(engine, random_ids(4, 2), 2)
    after.ids()

    assert waiting.news.empty()
    assert engine.figures().cancelled == 1


def test_a_full_queue_and_a_long_prompt_are_refused(llama: Any, start: Start, gate: Gate) -> None:
    engine = start(llama, batch=1, queue=2)
    running = ask(engine, random_ids(4, 0), 20, at_first=gate.shut)
    running.next()
    waiting = [ask(engine, random_ids(4, seed), 2) for seed in (1, 2)]

    with pytest.raises(Overloaded, match="2 prompts are waiting"):
        ask(engine, random_ids(4, 3))
    with pytest.raises(PromptTooLong) as caught:
        ask(engine, random_ids(CONTEXT, 4))
    assert (caught.value.tokens, caught.value.limit) == (CONTEXT, CONTEXT - 1)
    with pytest.raises(Unknown, match=r"'other'.*found: none"):
        ask(engine, random_ids(4, 4), adapter="other")
    gate.open()
    assert [len(each.ids()) for each in waiting] == [2, 2]


def test_a_failed_prompt_fails_alone_without_a_word_of_it(llama: Any, start: Start) -> None:
    engine = start(llama)
    ids = random_ids(6, 1)
    running = ask(engine, ids, 120)
    running.next()
    broken = Broken(
        llama, lambda each: (each == SECRET).any(), RuntimeError(f"saw {SECRET} secret")
    )
    try:
        failed = ask(engine, [SECRET, 5, 6])
        with pytest.raises(EngineFailure) as caught:
            failed.ids()
        rest = running.ids()
    finally:
        broken.handle.remove()

    assert "RuntimeError" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert str(SECRET) not in str(caught.value)
    # The token that was heard first is the answer's first.
    assert rest == transformers_answer(llama, ids, 120)[1:]
    assert engine.figures().failed == 1


def test_a_failed_step_fails_the_batch_and_the_engine_goes_on(
    llama: Any, start: Start, gate: Gate
) -> None:
    engine = start(llama)
    broken = Broken(llama, lambda each: each.shape == (2, 1), ValueError("secret"))
    try:
        gate.shut()
        both = [ask(engine, random_ids(6, seed), 200) for seed in (1, 2)]
        gate.open()
        for each in both:
            with pytest.raises(EngineFailure, match="ValueError"):
                each.ids()
    finally:
        broken.handle.remove()

    assert broken.raised == 1
    assert ask(engine, random_ids(6, 3), 8).ids() == transformers_answer(llama, random_ids(6, 3), 8)
    assert engine.figures().failed == 2


def test_without_memory_the_batch_is_halved_and_answers_stay_right(
    llama: Any, start: Start, gate: Gate
) -> None:
    broken = Broken(llama, lambda each: len(each) > 3, torch.OutOfMemoryError("none left"))
    try:
        engine = start(llama, batch=8)
        ids = [random_ids(6 + seed, seed) for seed in range(8)]
        gate.shut()
        heard = [ask(engine, each, 25) for each in ids]
        gate.open()
        answers = [each.ids() for each in heard]
        limit = engine.figures().batch_limit
    finally:
        broken.handle.remove()

    assert answers == [transformers_answer(llama, each, 25) for each in ids]
    assert broken.raised >= 1
    assert 1 <= limit <= 3
    assert engine.figures().failed == 0


def test_draws_go_on_where_they_were_when_memory_ran_out(
    llama: Any, start: Start, gate: Gate
) -> None:
    engine = start(llama, batch=8)
    ids = [random_ids(6, seed) for seed in range(4)]
    drawn: dict[str, Any] = {"temperature": 1.0, "new": 40}
    alone = [ask(engine, each, seed=place, **drawn).ids() for place, each in enumerate(ids)]
    broken = Broken(llama, lambda each: len(each) > 3, torch.OutOfMemoryError("none left"))
    try:
        gate.shut()
        heard = [ask(engine, each, seed=place, **drawn) for place, each in enumerate(ids)]
        gate.open()
        found = [each.ids() for each in heard]
    finally:
        broken.handle.remove()

    assert broken.raised >= 1
    assert found == alone


def test_one_answer_that_has_no_memory_fails(llama: Any, start: Start) -> None:
    engine = start(llama)
    broken = Broken(llama, lambda each: True, torch.OutOfMemoryError("none left"))
    try:
        with pytest.raises(EngineFailure, match="out of memory"):
            ask(engine, random_ids(6, 0)).ids()
    finally:
        broken.handle.remove()

    assert len(ask(engine, random_ids(6, 0), 3).ids()) == 3


class Tight(BatchedDecoder):
    """A decoder that has no room beside what is kept."""

    def begin(self, answers: Any, kept: Any) -> Any:
        if any(kept):
            raise torch.OutOfMemoryError("none left")
        return super().begin(answers, kept)


def test_what_is_kept_makes_room_for_answers(llama: Any) -> None:
    served = Served(llama, CPU, torch.float32, RowAdapters(llama))
    engine = ContinuousEngine(served, Tight(served), CONTEXT, Limits(prefill_tokens=16))
    ids = random_ids(40, 1)
    try:
        once = ask(engine, ids, 5).ids()
        kept = engine.figures().prefix_bytes
        again = ask(engine, ids, 5).tokens()
    finally:
        engine.close()

    assert kept > 0
    assert [each.id for each in again] == once
    assert again[0].cached == 0


def test_an_answer_that_nobody_hears_is_given_up(llama: Any, start: Start) -> None:
    engine = start(llama)
    heard: list[object] = []

    def deaf(news: object) -> None:
        heard.append(news)
        raise OSError("gone")

    engine.submit(Prompt(tuple(random_ids(5, 0)), Choice(200, temperature=0)), deaf)
    beside = ask(engine, random_ids(5, 1), 40)

    assert len(beside.ids()) == 40
    assert len(heard) <= 2
    assert engine.figures().cancelled == 1


def test_close_ends_everything(llama: Any, start: Start, gate: Gate) -> None:
    engine = start(llama, batch=1)
    running = ask(engine, random_ids(5, 0), 200, at_first=gate.shut)
    waiting = ask(engine, random_ids(5, 1), 200)
    running.next()
    closing = threading.Thread(target=engine.close)
    closing.start()
    # It waits for the pass that is held up.
    closing.join(0.2)
    gate.open()
    closing.join(60)

    for each in (running, waiting):
        with pytest.raises(EngineFailure, match="closed"):
            each.ids()
    with pytest.raises(Overloaded, match="closed"):
        ask(engine, random_ids(5, 2))
    assert not closing.is_alive()
    assert engine.figures().cache_bytes == engine.figures().prefix_bytes == 0


def test_prompts_may_come_from_many_threads(llama: Any, start: Start) -> None:
    engine = start(llama, batch=6, prefill_tokens=32)
    found: dict[int, list[int]] = {}

    def talk(seed: int) -> None:
        found[seed] = ask(engine, random_ids(4 + 7 * seed, seed), 10).ids()

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(12)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)

    for seed, answer in found.items():
        assert answer == transformers_answer(llama, random_ids(4 + 7 * seed, seed), 10)
    assert len(found) == 12


def test_a_long_prompt_does_not_hold_the_others_up(llama: Any, start: Start, gate: Gate) -> None:
    engine = start(llama, prefill_tokens=16)
    columns: list[int] = []
    handle = llama.register_forward_pre_hook(
        lambda _, args, kwargs: columns.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        running = ask(engine, random_ids(4, 0), 60, at_first=gate.shut)
        running.next()
        long = ask(engine, random_ids(200, 1), 2)
        told_long: list[bool] = []
        short = ask(engine, random_ids(6, 2), 2,
                    at_first=lambda: told_long.append(not long.news.empty()))  # fmt: skip
        gate.open()
        short.ids()
        long.ids()
        running.ids()
    finally:
        handle.remove()

    assert max(columns) <= 16
    assert told_long == [False]


def test_embeddings_are_the_mean_of_the_last_hidden_states(llama: Any, start: Start) -> None:
    engine = start(llama)
    running = ask(engine, random_ids(4, 0), 50)
    texts = [random_ids(length, length) for length in (3, 20)]
    found = engine.embed(texts)
    with torch.inference_mode():
        expected = [
            llama(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(0)
            for ids in texts
        ]

    assert torch.allclose(torch.tensor(found), torch.stack(expected), atol=1e-5)
    assert len(running.ids()) == 50
    with pytest.raises(PromptTooLong):
        engine.embed([random_ids(CONTEXT + 1, 0)])


def test_long_texts_are_read_in_pieces_beside_running_answers(llama: Any, start: Start) -> None:
    engine = start(llama, prefill_tokens=16)
    running = ask(engine, random_ids(4, 0), 50)
    text = random_ids(100, 7)
    columns: list[int] = []
    handle = llama.register_forward_pre_hook(
        lambda _, __, arguments: columns.append(arguments["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        (scored,) = engine.score([text], top=2)
        (vector,) = engine.embed([text])
        running.ids()
    finally:
        handle.remove()
    with torch.inference_mode():
        whole = llama(torch.tensor([text]), output_hidden_states=True)
    logprobs = whole.logits[0].log_softmax(-1)
    own = [float(logprobs[place, token]) for place, token in enumerate(text[1:])]

    assert max(columns) <= 16
    assert [each.id for each in scored] == text
    assert scored[0].logprob is None
    assert [each.logprob for each in scored[1:]] == pytest.approx(own, abs=1e-4)
    assert [each.top[0][0] for each in scored[1:]] == logprobs[:-1].argmax(-1).tolist()
    expected = whole.hidden_states[-1][0].mean(0)
    assert torch.allclose(torch.tensor(vector), expected, atol=1e-5)
    with pytest.raises(Unknown):
        engine.score([text], 1, "none")


def test_texts_are_read_whole_where_a_model_goes_on_from_no_piece(start: Start) -> None:
    model = random_model("mamba", attention="eager")
    engine = start(model, prefill_tokens=16)
    text = random_ids(40, 3)
    (scored,) = engine.score([text], top=1)
    with torch.inference_mode():
        logprobs = model(torch.tensor([text])).logits[0].log_softmax(-1)

    assert [each.logprob for each in scored[1:]] == pytest.approx(
        [float(logprobs[place, token]) for place, token in enumerate(text[1:])], abs=1e-4
    )


def test_closing_fails_texts_that_wait(llama: Any, start: Start, gate: Gate) -> None:
    engine = start(llama)
    gate.shut()
    failures: list[BaseException | None] = []

    def score() -> None:
        try:
            engine.score([random_ids(5, 1), random_ids(5, 2)], top=0)
        except EngineFailure as failure:
            failures.append(failure)

    asking = threading.Thread(target=score)
    asking.start()
    while not engine._work.texts:
        time.sleep(0.001)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._work.closing:
        time.sleep(0.001)
    gate.open()
    closing.join(60)
    asking.join(60)

    assert len(failures) == 1
