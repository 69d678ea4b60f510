"""Encoded rows and a tiny model in memory for the trainer's tests."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mst.configuration import Configuration
from mst.data.encode import Example
from mst.data.rows import Row
from mst.memory import StepShape, forecast
from mst.model.facts import read_facts
from mst.plan import Plan
from mst.request import TrainRequest
from mst.training.report import EvalMetrics, StepMetrics
from mst.training.session import Session, make_session

if TYPE_CHECKING:
    import torch


def example(ids: list[int], answer: int) -> Example:
    """Return a row of which the last `answer` tokens carry loss."""
    labels = [-100] * (len(ids) - answer) + ids[-answer:]
    return Example(array("i", ids), array("i", labels), Row((), "memory", 1))


@pytest.fixture
def examples() -> list[Example]:
    """Rows of unlike lengths with unlike numbers of label tokens."""
    import random

    draw = random.Random(0)
    return [
        example([draw.randrange(4, 6000) for _ in range(length)], answer)
        for length, answer in [(7, 2), (19, 5), (12, 1), (30, 9), (5, 3), (23, 4), (9, 2)]
    ]


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Example:
    """Return a preference between two answers."""
    worse = example(prompt + rejected, len(rejected))
    return dataclasses.replace(example(prompt + chosen, len(chosen)), rejected=worse)


@pytest.fixture
def pairs() -> list[Example]:
    """Preferences of unlike lengths."""
    import random

    draw = random.Random(1)

    def ids(length: int) -> list[int]:
        return [draw.randrange(4, 6000) for _ in range(length)]

    sizes = [(5, 2, 4), (11, 6, 3), (8, 1, 1), (14, 9, 7), (3, 3, 12), (17, 4, 2), (6, 2, 2)]
    return [pair(ids(prompt), ids(one), ids(other)) for prompt, one, other in sizes]


@pytest.fixture
def judged(examples: list[Example]) -> list[Example]:
    """The rows with a verdict each, as KTO takes them."""
    verdicts = (True, False, True, True, False, True, False)
    return [
        dataclasses.replace(each, row=Row((), "memory", 1, desirable=verdict))
        for each, verdict in zip(examples, verdicts, strict=True)
    ]


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    """The tiny model in float32."""
    import torch

    from mst.training.adapters import load_model

    return load_model(tiny_model, "float32", "sdpa", torch.device("cpu"))


class Record:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []
        self.evaluations: list[EvalMetrics] = []
        self.saves: list[int] = []
        self.shrinks: list[tuple[int, int, int]] = []

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def evaluation(self, metrics: EvalMetrics) -> None:
        self.evaluations.append(metrics)

    def saved(self, step: int) -> None:
        self.saves.append(step)

    def shrunk(self, step: int, before: int, after: int) -> None:
        self.shrinks.append((step, before, after))


def tiny_plan(model_dir: Path, **changes: object) -> Plan:
    """Return a plan for the tiny model on the CPU, in float32."""
    shape = StepShape(tokens=64, label_tokens=16)
    configuration = Configuration(
        compute_dtype="float32", weights_dtype="float32", lora_rank=4, micro_batch=2
    )
    memory = forecast(read_facts(model_dir), configuration, shape, None)
    values: dict[str, object] = {
        "backend": "cpu",
        "torch_devices": ("cpu",),
        "distributed_backend": "gloo",
        "strategy": "single",
        "tuner": "lora",
        "compute_dtype": "float32",
        "weights_dtype": "float32",
        "attention": "sdpa",
        "threads": 1,
        "environment": {},
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "train_rows": 7,
        "val_rows": 0,
        "steps_per_epoch": 4,
        "total_steps": 8,
        "label_accuracy": False,
        "memory": memory,
        "reasons": (),
    }
    return Plan(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def torchs_own_again() -> Iterator[None]:
    """Give transformers its own attention back after a test that has used that in blocks."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    before = functions["sdpa"]
    yield
    functions["sdpa"] = before


@pytest.fixture
def record() -> Record:
    """What the loop reported."""
    return Record()


@pytest.fixture
def begin(
    tiny_model: Path, examples: list[Example], tmp_path: Path, record: Record
) -> Callable[..., Session]:
    """Return a function that makes a session of the tiny model, anew and always the same.

    Keywords that Plan knows change the plan; the others change the request. `packing` says that
    the model keeps rows apart, `blocks` asks for `--packing`, `shares` computes beginnings once.
    """

    def make(
        val: Sequence[Example] = (),
        stop: Callable[[], bool] = lambda: False,
        packing: bool = True,
        blocks: bool = False,
        train: Sequence[Example] | None = None,
        shares: bool = False,
        **changes: Any,
    ) -> Session:
        import torch

        from mst.training.adapters import (
            enable_checkpointing,
            load_model,
            lora_config,
            prepare_model,
        )

        of_plan = {each.name for each in dataclasses.fields(Plan)}
        plan = tiny_plan(tiny_model, **{k: v for k, v in changes.items() if k in of_plan})
        options = {k: v for k, v in changes.items() if k not in of_plan}
        request = TrainRequest(
            **({"lora_rank": 4, "logging_steps": 1, "packing": blocks} | options)
        )
        cpu = torch.device("cpu")
        torch.manual_seed(0)
        model = load_model(
            tiny_model,
            plan.weights_dtype,
            "sdpa",
            cpu,
            plan.quantization,
            plan.compute_dtype,
            0 if request.task == "rm" else None,
        )
        torch.manual_seed(0)
        model = prepare_model(model, None if plan.tuner == "full" else lora_config(request))
        if plan.gradient_checkpointing:
            enable_checkpointing(model, plan.checkpointed_layers)
        return make_session(
            model,
            torch.device("cpu"),
            plan,
            request,
            packing=packing,
            train=examples if train is None else train,
            pad_token_id=0,
            checkpoints=tmp_path / "checkpoints",
            reporter=record,
            stop_asked=stop,
            val=val,
            shares=shares,
        )

    return make
