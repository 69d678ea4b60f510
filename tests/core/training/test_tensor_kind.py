"""Layers are compiled for the tensors that most of a run's micro-batches have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.core.training.conftest import example, pair, tiny_plan

from mst.data.encode import Example
from mst.request import TrainRequest
from mst.training.adapters import decoder_layers
from mst.training.batches import Layout
from mst.training.compilation import kinds_given
from mst.training.loss import forward_arguments
from mst.training.objectives import find_objective
from mst.training.scoring import lay_out
from mst.training.tensor_kind import TensorKind, compiled_layout, tensor_kind


def rows(*lengths: int) -> list[Example]:
    return [example([n, *range(4, 3 + length)], 2) for n, length in enumerate(lengths, 4)]


def kind(
    model: Path, examples: list[Example], rows: int, layout: Layout, **more: object
) -> TensorKind:
    shares = bool(more.pop("shares", False))
    request = TrainRequest(**more)  # type: ignore[arg-type]
    plan = tiny_plan(model, per_device_train_batch_size=rows)
    return tensor_kind(plan, request, find_objective(request), examples, layout, shares)


CASES: list[tuple[list[Example], int, Layout, bool, bool]] = [
    (rows(64, 64, 64, 64), 2, "alike", True, False),
    (rows(60, 60, 60, 60), 2, "alike", True, True),
    (rows(32, 32, 32, 32), 4, "alike", True, True),
    (rows(48, 48, 48, 48), 2, "padded", True, False),
    (rows(48, 40, 48, 40), 4, "padded", True, True),
    (rows(50, 51, 52), 1, "alike", False, False),
    (rows(30, 20, 30, 20), 4, "single", False, True),
]


@pytest.mark.parametrize(("examples", "together", "layout", "several", "masked"), CASES)
def test_it_is_what_plain_layers_are_given(
    examples: list[Example],
    together: int,
    layout: Layout,
    several: bool,
    masked: bool,
    tiny_model: Path,
    model: torch.nn.Module,
) -> None:
    found = kind(tiny_model, examples, together, layout)
    laid = lay_out(examples[:together], 0, layout)
    with kinds_given(decoder_layers(model)) as given, torch.no_grad():
        model(**forward_arguments(model, laid.batch))

    assert found == TensorKind(several, masked)
    assert set(given.values()) == {found}


def test_most_micro_batches_decide(tiny_model: Path) -> None:
    mostly = rows(*[64] * 14, 7, 9)
    rarely = rows(64, 64, *[9 + n for n in range(14)])

    assert kind(tiny_model, mostly, 2, "alike") == TensorKind(several=True, masked=False)
    assert kind(tiny_model, rarely, 2, "alike") == TensorKind(several=True, masked=True)


def test_blocks_of_rows_have_lines_of_their_own(tiny_model: Path) -> None:
    small, full = rows(*[30] * 8), rows(*[64] * 8)

    def packed(examples: list[Example], blocks: int) -> TensorKind:
        return kind(tiny_model, examples, blocks, "alike", packing=True)

    assert packed(small, 1) == TensorKind(several=False, masked=True)
    assert packed(small, 2) == TensorKind(several=True, masked=True)
    assert packed(full, 2) == TensorKind(several=True, masked=False)


def test_what_rows_begin_with_alike_is_in_one_line(tiny_model: Path) -> None:
    prompt = list(range(4, 60))
    pairs = [pair([*prompt, n], [5, 6, 7], [8, 9]) for n in range(70, 74)]

    def preferences(shares: bool) -> TensorKind:
        return kind(tiny_model, pairs, 1, "alike", task="dpo", shares=shares)

    assert preferences(shares=True) == TensorKind(several=False, masked=True)
    assert preferences(shares=False) == TensorKind(several=True, masked=True)


def test_rows_that_begin_alike_lie_in_one_line_if_all_micro_batches_fit(tiny_model: Path) -> None:
    def layout(
        shares: bool = True,
        blocks: bool = True,
        held_out: Sequence[Example] = (),
        longest: int = 1000,
        **more: object,
    ) -> Layout:
        request = TrainRequest(**more)  # type: ignore[arg-type]
        plan = tiny_plan(tiny_model, per_device_train_batch_size=16)
        plan = replace(plan, block_attention=blocks)
        objective = find_objective(request)
        # 16 of them are most together: 40 tokens that all begin with, 15 times 64, and the longest.
        start = list(range(1000, 1040))
        examples = [example([*start, n, *range(4, 67)], 2) for n in range(70, 90)]
        examples.append(example([*start, *range(4, 4 + longest)], 2))
        return compiled_layout(plan, request, objective, examples, held_out, shares)

    assert layout() == "single"
    assert layout(longest=1048) == "single"
    assert layout(longest=1049) == layout(held_out=rows(20, 2048)) == "alike"
    assert layout(shares=False) == layout(blocks=False) == layout(packing=True) == "alike"


def test_answers_that_are_sampled_end_where_they_like(tiny_model: Path) -> None:
    def sampled(prompts: int, answers: int, shares: bool = False) -> TensorKind:
        return kind(
            tiny_model, rows(20, 20), prompts, "alike", task="grpo", num_generations=answers,
            reward_funcs=("exact_match",), shares=shares,
        )  # fmt: skip

    assert sampled(1, 4) == TensorKind(several=True, masked=True)
    assert sampled(1, 2, shares=True) == TensorKind(several=False, masked=True)
