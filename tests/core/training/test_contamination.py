"""Packed rows give the logits, the losses and the gradients that each gives alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from tests.core.training.conftest import example

from mst.data.encode import Example
from mst.training import batches, loop
from mst.training.batches import Batch, collate, collate_lines
from mst.training.checkpoint import TrainState
from mst.training.isolation import rows_stay_apart
from mst.training.loop import run
from mst.training.loss import summed_loss
from mst.training.order import RowSizes, step_rows

if TYPE_CHECKING:
    import torch

SMALL = {"vocab_size": 512, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 96, "num_key_value_heads": 2},
    "qwen2": {"intermediate_size": 96, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}


def made(kind: str, attention: str) -> torch.nn.Module:
    """Return a tiny model with random weights, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **KINDS[kind])
    untyped: Any = AutoModelForCausalLM
    model: torch.nn.Module = untyped.from_config(config, attn_implementation=attention)
    return model


@pytest.fixture
def rows() -> list[Example]:
    """Rows of unlike lengths, in ids that every tiny model has."""
    import random

    draw = random.Random(5)
    return [
        example([draw.randrange(4, 500) for _ in range(length)], answer)
        for length, answer in [(33, 6), (9, 2), (21, 20), (14, 1), (40, 12), (5, 3), (26, 8)]
    ]


def one_line(rows: list[Example]) -> Batch:
    return collate(rows, 0, "line")


def even_lines(rows: list[Example]) -> Batch:
    return collate(rows, 0, "lines")


def blocks(rows: list[Example]) -> Batch:
    return collate_lines([rows[:2], rows[2:3], rows[3:]], 0, "lines")


LAYOUTS = (one_line, even_lines, blocks)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lay", LAYOUTS)
def test_packed_logits_equal_those_of_rows_run_alone(
    kind: str,
    attention: str,
    lay: Callable[[list[Example]], Batch],
    rows: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(batches, "ATTENTION_WIDTH", 60)
    model: Any = made(kind, attention).eval()
    batch = lay(rows)
    with torch.no_grad():
        # As `summed_loss` runs it: with a cache, transformers would not go by positions.
        arguments = {"position_ids": batch.position_ids, "use_cache": False}
        packed = model(input_ids=batch.input_ids, **arguments).logits.flatten(0, 1)
        flat = batch.input_ids.flatten().tolist()
        for each in rows:
            ids = list(each.input_ids)
            alone = model(input_ids=torch.tensor([ids])).logits[0]
            # A row is found by its ids, which no other has.
            start = next(i for i in range(len(flat)) if flat[i : i + len(ids)] == ids)

            assert (packed[start : start + len(ids)] - alone).abs().max() <= 1e-5
    assert rows_stay_apart(model, 512, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lay", LAYOUTS)
def test_packed_gradients_equal_those_of_rows_run_alone(
    kind: str,
    lay: Callable[[list[Example]], Batch],
    rows: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(batches, "ATTENTION_WIDTH", 60)
    model = made(kind, "sdpa")
    labels = sum(label != -100 for each in rows for label in each.labels)

    def gradients(parts: list[Batch]) -> list[torch.Tensor]:
        model.zero_grad()
        for part in parts:
            loss: Any = summed_loss(model, part, "kept") / labels
            loss.backward()
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    alone = gradients([collate([each], 0, "padded") for each in rows])
    packed = gradients([lay(rows)])

    for one, other in zip(alone, packed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * float(one.abs().max()), rtol=0)


def as_they_come(
    sizes: RowSizes, step: int, micro_batch: int, global_batch: int, seed: int, *_: object
) -> list[tuple[tuple[int, ...], ...]]:
    """Return a step's micro-batches without any arrangement."""
    chosen = step_rows(sizes, step, global_batch, seed)
    return [chosen[i : i + micro_batch] for i in range(0, len(chosen), micro_batch)]


@pytest.mark.parametrize("most", [1, 10**6])
def test_the_arrangement_does_not_change_the_losses_of_steps(
    begin: Callable[..., Any], record: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "steps_per_epoch": 2, "total_steps": 4,
    }  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(loop, "step_micro_batches", as_they_come)
        run(begin(**same, packing=False), TrainState())
    plain = [each.loss for each in record.steps]
    monkeypatch.setattr(batches, "ATTENTION_WIDTH", most)
    for packing in (True, False):
        record.steps.clear()
        run(begin(**same, packing=packing), TrainState())

        assert [each.loss for each in record.steps] == pytest.approx(plain, rel=1e-5)


def test_a_step_of_blocks_has_the_loss_of_their_rows(
    begin: Callable[..., Any], record: Any, examples: list[Example]
) -> None:
    session = begin(max_length=40, total_steps=1, blocks=True)
    chosen = [row for rows in step_rows(session.sizes, 0, 2, 42) for row in rows]
    run(session, TrainState())
    model = begin().model
    total = sum(
        float(summed_loss(model, collate([examples[row]], 0, "padded"), "kept").detach())
        for row in chosen
    )
    labels = sum(label != -100 for row in chosen for label in examples[row].labels)

    assert len(chosen) > 2
    assert record.steps[0].loss == pytest.approx(total / labels, rel=1e-5)
