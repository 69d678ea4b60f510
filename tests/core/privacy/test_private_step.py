"""Private steps against the same sums made row by row without hooks."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.core.training.conftest import begin, examples, record

from mst.data.encode import IGNORE, Example
from mst.data.rows import Row
from mst.errors import TrainingError
from mst.plan import PrivacyBudget
from mst.training.checkpoint import TrainState

if TYPE_CHECKING:
    import torch

    from mst.training.private_step import Private
    from mst.training.session import Session

__all__ = ["begin", "examples", "record"]
pytest.importorskip("opacus", reason="wants the extra dp")
Begin = Callable[..., Any]
KEY = bytes(range(32))


def row(unit: str, number: int, length: int) -> Example:
    ids = array("i", [(7 * number + 3 * place) % 6000 + 5 for place in range(length)])
    labels = array("i", [IGNORE] * (length // 2) + list(ids[length // 2 :]))
    return Example(ids, labels, Row((), "rows", number, unit=unit))


# Units of one, two and seven rows, not side by side.
ROWS = [row(unit, number, 6 + 5 * number % 17) for number, unit in enumerate("abcbccdcccc")]


def budget(**changes: Any) -> PrivacyBudget:
    made = PrivacyBudget(
        epsilon=1.0, delta=1e-3, unit="unit", units=4, sample_rate=1.0, steps=8,
        noise_multiplier=1.0, max_grad_norm=1.0, accountant="none", epsilon_checked=1.0,
    )  # fmt: skip
    return replace(made, **changes)


def started(session: Session, **changes: Any) -> tuple[Session, Private]:
    """Return a session of private steps; adapters begin where all of them have gradients."""
    import torch

    from mst.privacy.units import grouped
    from mst.training.private_step import Private
    from mst.training.row_gradients import RowGradients

    rows = RowGradients(session.model)
    generator = torch.Generator().manual_seed(1)
    for each in rows.weights:
        each.data.copy_(torch.randn(each.shape, generator=generator) * 0.1)
    private = Private(budget(**changes), KEY, grouped(each.row for each in session.train), rows)
    return replace(session, private=private), private


def by_hand(session: Session, private: Private, most: float) -> list[torch.Tensor]:
    """Return the sum of the units' clipped mean gradients, a backward pass a row."""
    import torch

    from mst.training.micro_batches import row_losses

    weights = private.rows.weights
    totals = [torch.zeros_like(each) for each in weights]
    for unit in private.units:
        with private.rows.off():
            losses = [row_losses(session, [session.train[place]])[0] for place in unit]
            private.rows.backward(torch.stack(losses).mean())
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]
        norm = torch.stack([each.norm() for each in gradients]).norm()
        for total, each in zip(totals, gradients, strict=True):
            total += each * min(1.0, most / float(norm))
        private.rows.forget()
    return totals


def flat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat([each.flatten() for each in parts])


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 11])
@pytest.mark.parametrize("most", [1e6, 0.05])
def test_units_are_clipped_as_by_hand_however_their_rows_are_cut(
    begin: Begin, micro_batch: int, most: float
) -> None:
    from mst.training.private_step import clipped_sums

    session, private = started(begin(train=ROWS, packing=False), max_grad_norm=most)
    wanted = flat(by_hand(session, private, most))
    found = clipped_sums(session, private, 0, micro_batch)

    assert found.units == 4
    assert found.tokens == sum(len(each.input_ids) for each in ROWS)
    assert float((flat(found.sums) - wanted).norm() / wanted.norm()) < 1e-4


def test_one_unit_moves_the_sum_by_no_more_than_the_clipping_norm(begin: Begin) -> None:
    from mst.training.private_step import clipped_sums

    session, private = started(begin(train=ROWS, packing=False), max_grad_norm=0.05)
    whole = flat(clipped_sums(session, private, 0, 4).sums)
    for unit in range(4):
        rest = [each for place, each in enumerate(private.units) if place != unit]
        without = flat(clipped_sums(session, replace(private, units=rest), 0, 4).sums)

        assert float((whole - without).norm()) <= 0.05 * (1 + 1e-4)


def test_a_row_whose_gradient_is_not_finite_moves_nothing(begin: Begin) -> None:
    from mst.training.private_step import clipped_sums

    session, private = started(begin(train=ROWS, packing=False))
    before = flat(clipped_sums(session, private, 0, 4).sums)
    poisoned = replace(ROWS[0], weights=array("d", [float("inf")] * len(ROWS[0].input_ids)))
    found = clipped_sums(replace(session, train=[poisoned, *ROWS[1:]]), private, 0, 4)
    without = clipped_sums(session, replace(private, units=private.units[1:]), 0, 4)

    assert bool(flat(found.sums).isfinite().all())
    assert float((flat(found.sums) - flat(without.sums)).norm() / before.norm()) < 1e-4


def test_noise_has_the_deviation_of_the_budget(begin: Begin) -> None:
    import torch

    from mst.training.private_step import set_noisy_gradients

    _, private = started(
        begin(train=ROWS, packing=False), noise_multiplier=3.0, max_grad_norm=0.5, sample_rate=0.5
    )
    zeros = [torch.zeros_like(each) for each in private.rows.weights]
    norm = set_noisy_gradients(private, zeros, 0)
    noise = flat([each.grad for each in private.rows.weights if each.grad is not None])
    # The sum's deviation over the two units that are drawn on average.
    wanted = 3.0 * 0.5 / (0.5 * 4)

    assert float(noise.std()) == pytest.approx(wanted, rel=0.03)
    assert norm == pytest.approx(float(noise.norm()), rel=1e-5)


def test_a_step_that_draws_nobody_is_taken_all_the_same(begin: Begin) -> None:
    from mst.training.loop import run

    session, _ = started(begin(train=ROWS, packing=False, total_steps=2), sample_rate=1e-9)
    before = flat([each.detach().clone() for each in session.private.rows.weights])  # type: ignore[union-attr]
    outcome = run(session, TrainState())
    after = flat([each.detach() for each in session.private.rows.weights])  # type: ignore[union-attr]
    steps = session.reporter.steps  # type: ignore[attr-defined]

    assert (outcome.ending, outcome.state.step, outcome.state.tokens) == ("done", 2, 0)
    assert [(each.loss, each.metrics["units"]) for each in steps] == [(0.0, 0.0)] * 2
    assert float((after - before).abs().min()) > 0


@pytest.mark.parametrize("layers", [None, 1])
def test_checkpointing_leaves_the_same_gradients(begin: Begin, layers: int | None) -> None:
    from mst.training.adapters import enable_checkpointing
    from mst.training.private_step import clipped_sums

    plain, private = started(begin(train=ROWS, packing=False))
    wanted = flat(clipped_sums(plain, private, 0, 4).sums)
    session = begin(train=ROWS, packing=False)
    enable_checkpointing(session.model, layers, row_gradients=True)
    session, private = started(session)
    found = flat(clipped_sums(session, private, 0, 4).sums)

    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_gradients_of_rows_are_proved_and_adapters_left_as_they_were(begin: Begin) -> None:
    from mst.training.row_gradients import check_row_gradients

    session, private = started(begin(train=ROWS, packing=False, lora_dropout=0.3))
    before = flat([each.detach().clone() for each in private.rows.weights])
    check_row_gradients(session, private.rows)

    assert bool((flat([each.detach() for each in private.rows.weights]) == before).all())


def test_a_model_that_lets_rows_meet_is_refused(begin: Begin) -> None:
    from mst.training.row_gradients import check_row_gradients

    session, private = started(begin(train=ROWS, packing=False))

    def meet(module: Any, inputs: Any, output: Any) -> Any:
        return output + output.mean(dim=0, keepdim=True)

    layer = session.model.get_base_model().model.layers[0].mlp  # type: ignore[operator]
    handle = layer.register_forward_hook(meet)
    try:
        with pytest.raises(TrainingError, match="can't be told from those of the rows beside it"):
            check_row_gradients(session, private.rows)
    finally:
        handle.remove()


def test_a_model_whose_experts_gather_tokens_is_refused(tmp_path: Path) -> None:
    import torch
    from tests.core.training.conftest import Record, tiny_plan
    from transformers import MixtralConfig, MixtralForCausalLM

    from mst.request import TrainRequest
    from mst.training.adapters import lora_config, prepare_model
    from mst.training.row_gradients import RowGradients, check_row_gradients
    from mst.training.session import make_session

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=6400, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    made = MixtralForCausalLM(config)
    made.save_pretrained(tmp_path)
    request = TrainRequest(target_modules=("gate",), lora_rank=4)
    model = prepare_model(made, lora_config(request))
    plan = tiny_plan(tmp_path)
    session = make_session(
        model, torch.device("cpu"), plan, request, packing=False, train=ROWS, pad_token_id=0,
        checkpoints=tmp_path / "c", reporter=Record(), stop_asked=lambda: False,
    )  # fmt: skip
    with pytest.raises(TrainingError, match="--target-modules that only its attention has"):
        check_row_gradients(session, RowGradients(model))
