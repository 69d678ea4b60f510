"""The schedule is transformers' own, step by step."""

from __future__ import annotations

import pytest

from mst.training.schedule import learning_rate_factor, warmup_steps


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_factors_equal_transformers(kind: str, warmup: int) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = "constant_with_warmup" if kind == "constant" else kind
    schedule = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        assert learning_rate_factor(step, 40, warmup, kind) == pytest.approx(
            schedule.get_last_lr()[0], abs=1e-12
        )
        optimizer.step()
        schedule.step()


def test_warmup_is_rounded_up() -> None:
    assert [warmup_steps(n, 0.03) for n in (0, 1, 75, 100)] == [0, 1, 3, 3]
