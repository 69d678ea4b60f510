"""Fast paths that are switched off by an option are not taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from tests.core.training.conftest import tiny_plan
from tests.reference_plans import MODELS, planned

from mst.data.prepare import prepare
from mst.errors import PlanError
from mst.request import TrainRequest
from mst.training.begin import session_of
from mst.training.objectives import find_objective
from mst.training.optimizers import make_optimizer
from mst.training.parallel import ALONE
from mst.training.task import Training
from mst.worker_process import StopAsked

CPU = torch.device("cpu")


def adamw_steps(fused_adamw: str) -> tuple[bool, torch.Tensor]:
    """Return whether AdamW is fused, and weights after a few steps."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 30)
    request = TrainRequest(fused_adamw=fused_adamw, weight_decay=0.1)
    optimizer = make_optimizer(layer, request, 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(8, 40)).square().sum().backward()
        optimizer.step()
    return bool(optimizer.defaults.get("fused")), layer.weight.detach()


def test_fused_adamw_takes_the_steps_of_torchs_plain_one() -> None:
    fused, weights = adamw_steps("auto")
    off, others = adamw_steps("off")

    assert fused
    assert not off
    torch.testing.assert_close(weights, others, atol=1e-5 * float(others.abs().max()), rtol=0)


def test_rows_are_padded_where_the_user_wants_it(
    tiny_model: Path, model: torch.nn.Module, chat_rows: Path, tmp_path: Path
) -> None:
    for choice, layout in (("auto", "lines"), ("off", "padded")):
        request = TrainRequest(padding_free=choice, tuner="full")
        data = (str(chat_rows),)
        prepared = prepare(request, data, tiny_model, None, find_objective(request))
        no_manifest: Any = cast("Any", None)  # it is read after the loop
        training = Training(
            tmp_path, Console(quiet=True), StopAsked(), request,
            tiny_plan(tiny_model, tuner="full"),
            no_manifest, prepared, model, CPU, ALONE,
        )  # fmt: skip

        assert session_of(training).layout == layout


def test_plans_count_on_padding_then() -> None:
    found = planned(MODELS[0], "cpu-16c-64gb", TrainRequest(padding_free="off"))

    assert not found.prefix_sharing
    with pytest.raises(PlanError, match="--padding-free off, which has each padded"):
        planned(MODELS[0], "cpu-16c-64gb", TrainRequest(padding_free="off", packing=True))
