"""TRL as oracle: same rows, model and options, so the same loss and rewards at every step.

Each step starts from the weights that the one before left, so equal figures mean equal gradients.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.core.training.conftest import example, pair

from mst.data.encode import Example
from mst.data.rows import Row
from mst.objective import Passes, Prelude, label_count
from mst.training.checkpoint import TrainState
from mst.training.loop import run
from mst.training.objectives.grpo import Completion
from mst.training.order import row_sizes, step_rows

BATCH, STEPS = 4, 4
# mst's names of what TRL logs under others.
SAME = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl")
RENAMED = {"rm": {"rewards/margins": "margin", "rewards/accuracies": "accuracy"}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dpo": ("dpo", {"beta": 0.3}, {"beta": 0.3}),
    "dpo-hinge": ("dpo", {"loss_type": "hinge"}, {"loss_type": ["hinge"]}),
    "dpo-ipo": ("dpo", {"loss_type": "ipo"}, {"loss_type": ["ipo"]}),
    "dpo-rpo": (
        "dpo", {"rpo_alpha": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    ),
    "kto": (
        "kto",
        {"desirable_weight": 1.5, "undesirable_weight": 0.5},
        {"desirable_weight": 1.5, "undesirable_weight": 0.5},
    ),
    "orpo": ("orpo", {"beta": 0.2}, {"beta": 0.2, "disable_dropout": False}),
    "simpo": (
        "simpo",
        {"simpo_gamma": 0.7, "label_smoothing": 0.1},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0,
         "label_smoothing": 0.1},
    ),
    "rm": ("rm", {}, {}),
    **{
        f"grpo-{kind}": (
            "grpo",
            {"beta": 0.3, "loss_type": kind, "temperature": 0.7, "reward_funcs": ("exact_match",),
             "num_generations": 2, "max_completion_length": 9},
            {"beta": 0.3, "loss_type": kind, "temperature": 0.7, "max_completion_length": 9},
        )
        for kind in ("dapo", "grpo", "dr_grpo")
    },
}  # fmt: skip


def rows_of(task: str) -> list[Example]:
    """Return eight rows of unlike lengths."""
    draw = random.Random(2)

    def ids(length: int) -> list[int]:
        return [draw.randrange(4, 6000) for _ in range(length)]

    sizes = [(5, 2, 4), (11, 6, 3), (8, 1, 1), (14, 9, 7), (3, 3, 12), (17, 4, 2), (6, 2, 2)]
    if task == "kto":
        return [
            Example(each.input_ids, each.labels, Row((), "memory", 1, desirable=number % 3 > 0))
            for number, (prompt, answer, _) in enumerate([*sizes, (9, 5, 5)])
            for each in [example(ids(prompt + answer), answer)]
        ]
    return [pair(ids(prompt), ids(one), ids(other)) for prompt, one, other in [*sizes, (9, 5, 5)]]


def completions_of(row: Example) -> list[Completion]:
    """Return both answers of a pair as GRPO has judged them."""
    assert row.rejected is not None
    gain = 0.1 * (len(row.input_ids) % 7) - 0.2
    return [
        Completion(each.input_ids, each.labels, each.row, advantage=advantage)
        for each, advantage in ((row, gain), (row.rejected, -0.6 * gain))
    ]


def judged_before(step: Sequence[Example], places: Sequence[int], passes: Passes) -> Prelude:
    """Stand in for sampling and judging."""
    found = [each for place in places for each in completions_of(step[place])]
    return Prelude(found, {"completion tokens": float(sum(map(label_count, found)))})


def as_trl(row: Example) -> dict[str, Any]:
    """Return a row as the script takes it."""
    begins = next(i for i, label in enumerate(row.labels) if label != -100)
    prompt, answer = list(row.input_ids[:begins]), list(row.input_ids[begins:])
    if row.rejected is None:
        return {"prompt": prompt, "completion": answer, "label": row.row.desirable}
    return {"prompt": prompt, "chosen": answer, "rejected": list(row.rejected.input_ids[begins:])}


def as_trl_rows(task: str, row: Example) -> list[dict[str, Any]]:
    """Return what the script takes of a row: it, or its completions."""
    if task != "grpo":
        return [as_trl(row)]
    return [{**as_trl(each), "advantage": each.advantage} for each in completions_of(row)]


def in_order(rows: Sequence[Example]) -> list[Example]:
    """Return the rows as the steps visit them."""
    sizes = row_sizes(rows, None)
    return [
        rows[i] for step in range(STEPS) for item in step_rows(sizes, step, BATCH, 42) for i in item
    ]


@pytest.fixture(scope="module")
def logged(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What TRL logs of each step of each case, in a process of its own."""
    pytest.importorskip("trl")
    directory = tmp_path_factory.mktemp("trl")
    specs = {
        case: {
            "task": task, "options": options, "model": str(tiny_model), "seed": 0,
            "batch": 2 * BATCH if task == "grpo" else BATCH,
            "rows": [one for each in in_order(rows_of(task)) for one in as_trl_rows(task, each)],
        }
        for case, (task, _, options) in CASES.items()
    }  # fmt: skip
    (directory / "specs.json").write_text(json.dumps(specs), encoding="utf-8")
    script = Path(__file__).with_name("trl_oracle.py")
    # TRL counts its starts at a hub unless it believes that it runs in a test.
    offline = {"HF_HUB_OFFLINE": "1", "CI": "1", "HF_HOME": str(directory / "home")}
    done = subprocess.run(
        [sys.executable, str(script), str(directory / "specs.json"), str(directory / "logs.json")],
        env=os.environ | offline | {"TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((directory / "logs.json").read_text("utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_and_rewards_of_each_step_are_those_of_trl(
    case: str, begin: Callable[..., Any], record: Any, logged: dict[str, Any]
) -> None:
    task, options, _ = CASES[case]
    session = begin(
        task=task, train=rows_of(task), per_device_train_batch_size=2,
        gradient_accumulation_steps=2, steps_per_epoch=2, total_steps=STEPS, learning_rate=1e-2,
        warmup_ratio=0.0, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    if task == "grpo":
        session = replace(session, objective=replace(session.objective, before=judged_before))
    run(session, TrainState())
    logs = logged[case]

    assert len(logs) == STEPS
    assert [each.loss for each in record.steps] == pytest.approx(
        [each["loss"] for each in logs], abs=1e-4
    )
    for mine, other in zip(record.steps, logs, strict=True):
        assert mine.grad_norm == pytest.approx(other["grad_norm"], rel=1e-3)
        for name in SAME:
            found = other.get(RENAMED.get(task, {}).get(name, name))
            if found is not None:
                assert mine.metrics[name] == pytest.approx(found, abs=1e-4), name
    assert record.steps[-1].loss != pytest.approx(record.steps[0].loss, abs=1e-3)
