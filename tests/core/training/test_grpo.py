"""GRPO: answers drawn alike however a step is cut, the loss of its papers, rewards that rise."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mst.data.encode import Example
from mst.data.rows import Message, Row
from mst.data.tokens import load_tokenizer
from mst.errors import UsageError
from mst.objective import Draw
from mst.request import TrainRequest
from mst.training import checkpoint
from mst.training.checkpoint import TrainState
from mst.training.evaluation import held_out
from mst.training.loop import run
from mst.training.micro_batches import counted, part_of, preludes, share_of
from mst.training.objectives import find_objective
from mst.training.objectives.grpo import LOSS_TYPES, Completion, advantages
from mst.training.sampling import sampled
from mst.training.sealed_directory import remove

Begin = Callable[..., Any]
FAST = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
ASCII = """
def reward(prompts, completions, references):
    return [sum(letter.isascii() for letter in each) / max(1, len(each)) for each in completions]
"""


@pytest.fixture
def rows() -> list[Example]:
    """Six prompts of unlike lengths, with the reference "yes"."""
    import random

    draw = random.Random(5)
    talk = (Message("user", "a question"), Message("assistant", "yes"))
    found = []
    for number, length in enumerate((5, 11, 8, 14, 3, 17)):
        prompt = [draw.randrange(4, 6000) for _ in range(length)]
        labels = [-100] * length + [40, 2]
        row = Row(talk, "rows.jsonl", number + 1)
        found.append(Example(array("i", [*prompt, 40, 2]), array("i", labels), row))
    return found


@pytest.fixture
def grpo(begin: Begin, tiny_model: Path, tmp_path: Path, rows: list[Example]) -> Begin:
    """Return a function that begins a session of GRPO, by default over two prompts a step."""
    judge = tmp_path / "judge.py"
    judge.write_text(ASCII, encoding="utf-8")

    def make(**changes: Any) -> Any:
        options = {
            "task": "grpo", "train": rows, "reward_funcs": (str(judge),), "num_generations": 4,
            "max_completion_length": 6, "steps_per_epoch": 3, "total_steps": 4, **FAST, **changes,
        }  # fmt: skip
        return replace(begin(**options), tokenizer=load_tokenizer(tiny_model))

    return make


def trained_bytes(session: Any) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in session.model.parameters() if p.requires_grad]


def straightforward(
    session: Any, groups: list[list[Completion]], kind: str, beta: float, temperature: float
) -> Any:
    """Return the loss of groups of completions as TRL 1.16 writes it, a completion at a time."""
    import torch

    def said(each: Completion) -> Any:
        ids = torch.tensor([list(each.input_ids)])
        answer = sum(label != -100 for label in each.labels)
        logits = session.model(input_ids=ids).logits[0, -answer - 1 : -1] / temperature
        return logits.log_softmax(-1).gather(1, ids[0, -answer:, None])[:, 0]

    losses = []
    for group in groups:
        rewards = torch.tensor([each.reward for each in group])
        gains = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for each, gain in zip(group, gains, strict=True):
            policy = said(each)
            with torch.no_grad(), session.model.disable_adapter():
                reference = said(each)
            ratio = (policy - policy.detach()).exp()
            loss = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
            apart = reference - policy
            losses.append(loss + beta * ratio * (apart.exp() - apart - 1))
    if kind == "grpo":
        return torch.stack([each.mean() for each in losses]).mean()
    summed = torch.cat(losses).sum()
    tokens = sum(map(len, losses))
    return summed / (tokens if kind == "dapo" else len(losses) * 6)


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_the_loss_and_its_gradient_are_those_of_the_papers(
    kind: str, grpo: Begin, rows: list[Example]
) -> None:
    import torch

    session = grpo(loss_type=kind, beta=0.3, temperature=0.7)
    weights = [each for each in session.model.parameters() if each.requires_grad]
    torch.manual_seed(3)
    with torch.no_grad():
        for each in weights:  # apart from the reference
            each.add_(0.2 * torch.randn_like(each))
    share = share_of(session, rows, [((0,), (1,), (2,)), ((3,), (4,), (5,))])
    ready, sums = preludes(session, share, 0)
    known = counted(session, share, sums)
    session.model.eval()
    parts = [part_of(session, each, known) for each in ready]
    loss = torch.stack([each.loss for each in parts]).sum()
    ours = torch.autograd.grad(loss, weights)
    drawn = [each for one in ready for each in one.examples if isinstance(each, Completion)]
    groups = [drawn[first : first + 4] for first in range(0, len(drawn), 4)]
    expected = straightforward(session, groups, kind, 0.3, 0.7)
    theirs = torch.autograd.grad(expected, weights)

    assert len(groups) == 6
    assert sum(float(each.metrics["kl"]) for each in parts) > 1e-3
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-4)
    norm = torch.cat([each.flatten() for each in theirs]).norm()
    apart = torch.cat([(a - b).flatten() for a, b in zip(ours, theirs, strict=True)]).norm()
    assert float(apart / norm) < 1e-4


def test_what_is_sampled_beside_an_answer_does_not_change_it(
    grpo: Begin, rows: list[Example]
) -> None:
    session = grpo()
    draws = [Draw(each.input_ids[:-2], f"seed {i}") for i, each in enumerate(rows)]
    together = sampled(session, draws)
    alone = [sampled(session, [each])[0] for each in draws]
    others = sampled(session, [replace(each, seed="other") for each in draws])

    assert together == alone
    assert together != others
    assert session.model.training


def test_a_cold_draw_is_the_likeliest_answer(grpo: Begin, rows: list[Example]) -> None:
    import torch

    session = grpo(temperature=1e-5)
    prompt = rows[1].input_ids[:-2]
    found = sampled(session, [Draw(prompt, "seed")])[0]
    ids = list(prompt)
    for token in found.tokens:
        with torch.no_grad():
            assert int(session.model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)

    assert found.cut
    assert len(found.tokens) == 6


def test_draws_have_the_models_probabilities(grpo: Begin) -> None:
    import torch

    from mst.training.sampling import _chooser

    objective = replace(find_objective(grpo().request), temperature=2.0)
    count = 4000
    logits = torch.tensor([[1.0, -torch.inf, 3.0, 0.0]]).repeat(count, 1)
    choose = _chooser([f"draw {i}" for i in range(count)], 0, objective, torch.device("cpu"))
    tokens = choose(torch.zeros(count, 0), logits).argmax(-1)
    shares = torch.bincount(tokens, minlength=4) / count
    wanted = (logits[0] / 2).softmax(-1)

    assert shares[1] == 0
    # Four standard deviations of a share of 4000 draws.
    assert float((shares - wanted).abs().max()) < 4 * (0.25 / count) ** 0.5


def test_an_answer_ends_with_the_token_that_stops_it(grpo: Begin, rows: list[Example]) -> None:
    session = grpo(temperature=1e-5)
    draws = [Draw(each.input_ids[:-2], "seed") for each in rows]
    long = sampled(session, draws)
    stop = long[0].tokens[2]
    changed = replace(session.tokenizer, eos_token_ids=(stop,))
    found = sampled(replace(session, tokenizer=changed), draws)

    first = long[0].tokens.index(stop)
    assert found[0].tokens == long[0].tokens[: first + 1]
    assert not found[0].cut
    assert all(each.cut == (stop not in each.tokens) for each in found)


def test_neither_micro_batches_nor_padding_change_a_step(grpo: Begin, record: Any) -> None:
    def figures(**changes: Any) -> list[dict[str, float]]:
        run(grpo(**changes), TrainState())
        found = [{"norm": each.grad_norm, **each.metrics} for each in record.steps]
        record.steps.clear()
        return found

    whole = figures(per_device_train_batch_size=2, beta=0.1)
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    singly = figures(**cut, beta=0.1)
    padded = figures(per_device_train_batch_size=2, packing=False, beta=0.1)

    assert {"reward", "reward_std", "completion_length", "kl"} < set(whole[0])
    for one, other, third in zip(whole, singly, padded, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
        assert one == pytest.approx(third, rel=1e-3, abs=1e-5)


def test_a_resumed_run_ends_with_the_same_bytes(grpo: Begin) -> None:
    plan: dict[str, Any] = {"lora_dropout": 0.1, "save_steps": 100, "beta": 0.1}
    whole = grpo(**plan)
    run(whole, TrainState())
    remove(checkpoint.checkpoint_path(whole.checkpoints, 4))
    stops = iter([False] * 2 + [True])
    run(grpo(**plan, stop=lambda: next(stops)), TrainState())
    resumed = grpo(**plan)
    found = checkpoint.newest_whole(resumed.checkpoints)
    assert found is not None
    state = checkpoint.restore(
        found, resumed.model, resumed.optimizer, resumed.names, resumed.device
    )

    assert state.step == 2
    run(resumed, state)
    assert trained_bytes(resumed) == trained_bytes(whole)


def test_steps_count_the_tokens_of_the_answers(grpo: Begin, record: Any) -> None:
    run(grpo(total_steps=1, per_device_train_batch_size=6, steps_per_epoch=1), TrainState())
    step = record.steps[0]
    prompts = 4 * (5 + 11 + 8 + 14 + 3 + 17)

    assert step.tokens == prompts + round(24 * step.metrics["completion_length"])


def test_the_best_checkpoint_has_the_highest_reward(
    grpo: Begin, rows: list[Example], record: Any
) -> None:
    session = grpo(val=rows[:2], eval_steps=1)
    found = run(session, TrainState()).state
    rewards = [each.metrics["reward"] for each in record.evaluations]

    assert len(set(rewards)) > 1
    assert found.best_loss == -max(rewards)
    assert found.best_step == rewards.index(max(rewards)) + 1
    # Held-out rows are drawn alike every time.
    assert held_out(session)[1]["reward"] == rewards[-1]


@pytest.mark.slow
def test_training_raises_the_reward(grpo: Begin, rows: list[Example], record: Any) -> None:
    session = grpo(
        tuner="full", val=rows, per_device_train_batch_size=6, steps_per_epoch=1, total_steps=30,
        num_generations=8, eval_steps=30,
    )  # fmt: skip
    before = held_out(session)[1]["reward"]
    run(session, TrainState())
    rewards = [each.metrics["reward"] for each in record.steps]

    assert before < 0.75
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert record.evaluations[-1].metrics["reward"] > before + 0.2


def test_advantages_of_a_group_without_differences_are_zero() -> None:
    assert advantages([0.5, 0.5, 0.5]) == [0.0, 0.0, 0.0]
    assert advantages([1.0, 0.0]) == pytest.approx([0.70701, -0.70701], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing says which answers are good"),
        ({"reward_funcs": ("exact",)}, "Did you mean exact_match"),
        ({"reward_funcs": ("exact_match", "exact_match")}, "names exact_match twice"),
        ({"reward_funcs": ("exact_match",), "reward_weights": ("1", "2")}, "1 finite numbers"),
        ({"reward_funcs": ("exact_match",), "reward_weights": ("nan",)}, "1 finite numbers"),
        ({"reward_funcs": ("exact_match",), "packing": True}, "--packing was asked for"),
        ({"reward_funcs": ("exact_match",), "loss_type": "ipo"}, "dapo, grpo, dr_grpo"),
        ({"reward_funcs": ("exact_match",), "rpo_alpha": 1.0}, "does not read it"),
        ({"task": "sft", "num_generations": 4}, r"\(grpo does\)"),
    ],
)
def test_what_grpo_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_objective(TrainRequest(**{"task": "grpo", **options}))
