"""Objectives: the same however a step is cut, a reference that stays, rows that fit the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.core.training.conftest import pair

from mst.data.encode import Encoded, EncodeStats, Example
from mst.data.rows import Message, Row
from mst.data.usable import usable
from mst.errors import DataError, UsageError
from mst.objective import Micro, Scored
from mst.request import TASKS, TrainRequest
from mst.training import checkpoint
from mst.training.checkpoint import TrainState
from mst.training.evaluation import held_out
from mst.training.loop import run
from mst.training.objectives import BUILT_IN, find_objective
from mst.training.objectives.kto import mismatched
from mst.training.sealed_directory import remove

Begin = Callable[..., Any]
OVER_PAIRS = ("dpo", "orpo", "simpo")
# A rate at which the model moves far within a few steps.
FAST = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}


def trained_bytes(session: Any) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in session.model.parameters() if p.requires_grad]


def figures(record: Any) -> list[dict[str, float]]:
    """Return each step's loss, gradient norm and metrics, and forget them."""
    found = [{"loss": each.loss, "norm": each.grad_norm, **each.metrics} for each in record.steps]
    record.steps.clear()
    return found


def rows_for(task: str, pairs: Sequence[Example], judged: Sequence[Example]) -> Sequence[Example]:
    return judged if task == "kto" else pairs


@pytest.mark.parametrize("task", [*OVER_PAIRS, "kto"])
def test_neither_micro_batches_nor_padding_change_a_step(
    task: str, begin: Begin, record: Any, pairs: list[Example], judged: list[Example]
) -> None:
    rows = rows_for(task, pairs, judged)
    plan = {"steps_per_epoch": 2, "total_steps": 3, "task": task, "train": rows, **FAST}
    run(begin(per_device_train_batch_size=4, **plan), TrainState())
    whole = figures(record)
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    run(begin(**cut, **plan), TrainState())
    singly = figures(record)
    run(begin(per_device_train_batch_size=4, packing=False, **plan), TrainState())
    padded = figures(record)

    assert "rewards/margins" in whole[0]
    for one, other, third in zip(whole, singly, padded, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
        assert one == pytest.approx(third, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("task", [*OVER_PAIRS, "kto"])
def test_training_raises_the_margin(
    task: str, begin: Begin, record: Any, pairs: list[Example], judged: list[Example]
) -> None:
    session = begin(
        task=task, train=rows_for(task, pairs, judged), per_device_train_batch_size=7,
        steps_per_epoch=1, total_steps=12, **FAST,
    )  # fmt: skip
    run(session, TrainState())
    found = figures(record)

    assert found[-1]["loss"] < found[0]["loss"]
    assert found[-1]["rewards/margins"] > found[0]["rewards/margins"] + 0.05


@pytest.mark.parametrize("task", [*OVER_PAIRS, "kto"])
def test_a_resumed_run_ends_with_the_same_bytes_and_metrics(
    task: str, begin: Begin, record: Any, pairs: list[Example], judged: list[Example]
) -> None:
    plan: dict[str, Any] = {
        "task": task, "train": rows_for(task, pairs, judged), "total_steps": 6,
        "lora_dropout": 0.1, "save_steps": 100, **FAST,
    }  # fmt: skip
    whole = begin(**plan)
    run(whole, TrainState())
    told = figures(record)
    remove(checkpoint.checkpoint_path(whole.checkpoints, 6))
    stops = iter([False] * 3 + [True])
    run(begin(**plan, stop=lambda: next(stops)), TrainState())
    resumed = begin(**plan)
    found = checkpoint.newest_whole(resumed.checkpoints)
    assert found is not None
    state = checkpoint.restore(
        found, resumed.model, resumed.optimizer, resumed.names, resumed.device
    )
    run(resumed, state)

    assert trained_bytes(resumed) == trained_bytes(whole)
    assert figures(record) == told


def test_the_adapter_switched_off_is_the_model_before_training(
    begin: Begin, record: Any, pairs: list[Example]
) -> None:
    from mst.training.reference import Reference, frozen_copy

    plan: dict[str, Any] = {"task": "dpo", "train": pairs, "total_steps": 6, **FAST}
    run(begin(**plan), TrainState())
    switched = figures(record)
    session = begin(**plan)
    copied = replace(session, reference=Reference(frozen_copy(session.model)))
    run(copied, TrainState())

    assert figures(record) == switched
    assert switched[-1]["rewards/margins"] != 0


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_what_is_computed_before_training_is_what_the_reference_says(
    tuner: str, begin: Begin, record: Any, pairs: list[Example]
) -> None:
    plan: dict[str, Any] = {
        "task": "dpo", "train": pairs, "val": pairs[:3], "tuner": tuner, "total_steps": 4,
        **FAST, "learning_rate": 1e-3,
    }  # fmt: skip
    live = begin(**plan)
    run(live, TrainState())
    asked = figures(record)
    noted = begin(**plan, precompute_ref_log_probs=True)
    run(noted, TrainState())

    assert live.reference.notes == {}
    assert len(noted.reference.notes) == 7
    for one, other in zip(asked, figures(record), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert record.evaluations[0].metrics == pytest.approx(
        record.evaluations[-1].metrics, rel=1e-4, abs=1e-6
    )


@pytest.fixture
def long_pairs() -> list[Example]:
    """Preferences that fill several lines, in which they lie in another order."""
    import random

    draw = random.Random(3)

    def ids(length: int) -> list[int]:
        return [draw.randrange(4, 6000) for _ in range(length)]

    return [pair(ids(50 * k), ids(40 + k), ids(90 - k)) for k in (1, 6, 2, 5, 7, 3)]


@pytest.mark.parametrize("blocks", [False, True])
def test_sequences_in_several_lines_are_sorted_back(
    blocks: bool, begin: Begin, record: Any, long_pairs: list[Example]
) -> None:
    plan: dict[str, Any] = {
        "task": "dpo", "train": long_pairs, "total_steps": 2, "steps_per_epoch": 1, **FAST,
        "max_length": 1000, "per_device_train_batch_size": 6,
    }  # fmt: skip
    run(begin(**plan, blocks=blocks), TrainState())
    lines = figures(record)
    run(begin(**plan, blocks=blocks, precompute_ref_log_probs=True), TrainState())
    noted = figures(record)
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
    run(begin(**plan | single, packing=False), TrainState())
    padded = figures(record)

    # Before the first step all rewards are 0 but for rounding, so that none is the higher one.
    for each in (lines[0], noted[0], padded[0]):
        del each["rewards/accuracies"]
    for one, other, third in zip(lines, noted, padded, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
        assert one == pytest.approx(third, rel=1e-3, abs=1e-5)
    assert lines[1]["rewards/margins"] != 0


def test_full_tuning_keeps_a_frozen_copy(begin: Begin, record: Any, pairs: list[Example]) -> None:
    session = begin(task="dpo", train=pairs, tuner="full", total_steps=4, **FAST)
    before = [each.clone() for each in session.reference.copy.parameters()]
    run(session, TrainState())
    after = list(session.reference.copy.parameters())

    assert all(bool((one == other).all()) for one, other in zip(before, after, strict=True))
    assert figures(record)[-1]["rewards/margins"] > 0


@pytest.mark.parametrize("task", [*OVER_PAIRS, "kto"])
def test_evaluation_does_not_depend_on_its_micro_batches(
    task: str, begin: Begin, pairs: list[Example], judged: list[Example]
) -> None:
    rows = rows_for(task, pairs, judged)
    session = begin(task=task, train=rows, val=rows, total_steps=2, **FAST)
    run(session, TrainState())
    loss, metrics = held_out(session, 7)
    singly, others = held_out(session, 1)

    assert loss == pytest.approx(singly, rel=1e-5)
    assert metrics == pytest.approx(others, rel=1e-4, abs=1e-6)


def test_a_weight_of_two_doubles_a_tokens_part(begin: Begin, examples: list[Example]) -> None:
    from array import array

    def heavier(example: Example) -> Example:
        return replace(example, weights=array("f", [2.0] * len(example.labels)))

    session = begin()
    plain = held_out(replace(session, val=examples))[0]
    doubled = held_out(replace(session, val=[heavier(each) for each in examples]))[0]

    assert doubled == pytest.approx(2 * plain, rel=1e-5)


def test_losses_of_known_log_probabilities_are_those_of_the_papers() -> None:
    import math

    import torch

    def scored(values: list[list[float]]) -> Scored:
        found = torch.tensor(values)
        return Scored(found, (found != 0).float(), (found != 0).sum(-1).float())

    def loss(task: str, **options: Any) -> float:
        objective = find_objective(TrainRequest(task=task, **options))
        totals = {"pairs": 1.0, "tokens": 4.0, "chosen tokens": 2.0}
        return float(objective.loss(Micro((), policy, reference, totals)).loss)

    # Log-ratios: the better answer has gained 1.0, the worse one has lost 0.5.
    policy = scored([[-1.0, -2.0], [-2.5, 0.0]])
    reference = scored([[-2.0, -2.0], [-2.0, 0.0]])

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    def odds(value: float) -> float:
        return value - math.log(1 - math.exp(value))

    assert loss("dpo", beta=0.2) == pytest.approx(-math.log(sigmoid(0.2 * 1.5)))
    assert loss("dpo", loss_type="hinge", beta=0.2) == pytest.approx(1 - 0.2 * 1.5)
    assert loss("dpo", loss_type="ipo", beta=0.2) == pytest.approx((0.5 + 0.5 - 2.5) ** 2)
    smoothed = -0.9 * math.log(sigmoid(0.15)) - 0.1 * math.log(sigmoid(-0.15))
    assert loss("dpo", label_smoothing=0.1) == pytest.approx(smoothed)
    assert loss("dpo", rpo_alpha=0.5) == pytest.approx(-math.log(sigmoid(0.15)) + 0.5 * 3.0 / 2)
    assert loss("simpo", beta=2.0, simpo_gamma=0.5) == pytest.approx(
        -math.log(sigmoid(2 * (-1.5 + 2.5) - 0.5))
    )
    assert loss("orpo", beta=0.1) == pytest.approx(
        3.0 / 4 - 0.1 * math.log(sigmoid(odds(-1.5) - odds(-2.5)))
    )


def test_kto_pairs_a_prompt_with_the_answer_before_it(judged: list[Example]) -> None:
    found = mismatched(judged[1], judged[0], max_length=None)
    cut = mismatched(judged[1], judged[0], max_length=15)

    assert list(found.input_ids) == [*judged[1].input_ids[:14], *judged[0].input_ids[5:]]
    assert list(found.labels) == [-100] * 14 + list(judged[0].input_ids[5:])
    assert list(cut.input_ids) == list(found.input_ids)[:15]


def test_pairs_of_equal_tokens_are_left_out_and_counted(pairs: list[Example]) -> None:
    objective = find_objective(TrainRequest(task="dpo"))
    same = replace(pairs[0], rejected=replace(pairs[0]))
    stats = EncodeStats(3, 0, 0, 0, 0, 0, 0)
    found = usable(objective, Encoded((same, pairs[1], same), stats))

    assert found.examples == (pairs[1],)
    assert found.unusable == 2
    with pytest.raises(DataError, match="all 1 rows have twice the same answer"):
        usable(objective, Encoded((same,), stats))


TALK = (Message("user", "a"), Message("assistant", "b"))
OTHER = (Message("user", "a"), Message("assistant", "c"))
ROWS = {
    "conversation": Row(TALK, "rows.jsonl", 3),
    "preference": Row(TALK, "rows.jsonl", 3, rejected=OTHER),
    "judged": Row(TALK, "rows.jsonl", 3, desirable=False),
    "text": Row((), "rows.jsonl", 3, text="a b"),
}
TAKEN = {
    "sft": {"conversation"}, "pt": {"text", "conversation"}, "kto": {"judged"},
    "grpo": {"conversation"},
    **{task: {"preference"} for task in (*OVER_PAIRS, "rm")},
}  # fmt: skip


@pytest.mark.parametrize("task", BUILT_IN)
def test_a_task_takes_its_rows_and_names_another_task_for_the_rest(task: str) -> None:
    rewards = ("exact_match",) if task == "grpo" else ()
    objective = find_objective(TrainRequest(task=task, reward_funcs=rewards))
    lacking = {kind: objective.lacks(row) for kind, row in ROWS.items()}

    assert {kind for kind, text in lacking.items() if not text} == TAKEN[task]
    assert all("--task" in text for text in lacking.values() if text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "dop"}, "Did you mean dpo"),
        ({"task": "dpo", "loss_type": "kl"}, "sigmoid, hinge, ipo"),
        ({"task": "dpo", "loss_type": "ipo", "label_smoothing": 0.1}, "only sigmoid has it"),
        ({"task": "sft", "beta": 0.1}, "does not read it"),
        ({"task": "kto", "simpo_gamma": 1.0}, "simpo does"),
        (
            {"task": "kto", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
            "one row a step",
        ),
    ],
)
def test_options_that_no_objective_can_meet_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        find_objective(TrainRequest(**options))


def test_every_task_has_its_module() -> None:
    assert tuple(BUILT_IN) == TASKS
