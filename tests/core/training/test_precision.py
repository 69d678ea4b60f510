"""Float16 training: a scale that overflows comes down, no row is passed over, resume keeps it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mst.errors import TrainingError
from mst.training import checkpoint, precision
from mst.training.checkpoint import TrainState
from mst.training.loop import run
from mst.training.session import check_placement

Begin = Callable[..., Any]


def test_an_overflowing_scale_is_halved_until_the_step_fits(begin: Begin, record: Any) -> None:
    run(begin(), TrainState())
    exact = [each.loss for each in record.steps]
    record.steps.clear()
    outcome = run(begin(compute_dtype="float16"), TrainState(loss_scale=2.0**40))

    assert outcome.state.loss_scale is not None
    assert 2.0**10 < outcome.state.loss_scale < 2.0**40
    assert outcome.state.good_steps > 0
    assert [each.loss for each in record.steps] == pytest.approx(exact, rel=1e-3)


def test_the_scale_begins_where_gradscaler_does_and_grows_as_slowly() -> None:
    import torch

    theirs: Any = torch.amp.GradScaler("cpu")

    assert precision.first_scale("float16") == theirs.get_scale()
    assert theirs.get_growth_interval() == precision.GROWTH_STEPS
    assert precision.after_good_step(8.0, precision.GROWTH_STEPS - 1, "float16") == (16.0, 0)
    assert precision.after_good_step(8.0, 5, "float16") == (8.0, 6)
    assert precision.after_good_step(1.0, 5, "bfloat16") == (1.0, 0)


def test_gradients_that_overflow_at_any_scale_end_the_run() -> None:
    assert precision.after_overflow(2.0) == 1.0
    assert precision.after_overflow(1.0) is None


def test_a_checkpoint_keeps_the_scale(begin: Begin, tmp_path: Path) -> None:
    run(begin(compute_dtype="float16", total_steps=2), TrainState(loss_scale=2.0**9))
    newest = checkpoint.newest_whole(tmp_path / "checkpoints")

    assert newest is not None
    state = checkpoint.read_state(newest)
    assert (state.loss_scale, state.good_steps) == (2.0**9, 2)


def test_a_model_elsewhere_than_planned_is_refused(model: Any) -> None:
    import torch

    check_placement(model, torch.device("cpu"))
    with pytest.raises(TrainingError, match=r"the plan says meta, but model\..* is on cpu"):
        check_placement(model, torch.device("meta"))
