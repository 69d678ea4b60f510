"""What a training loop works with: model, optimizer, rows, plan, and its place among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import TrainingError
from mst.training.adapters import trained_parameters
from mst.training.loss import keeps_logits
from mst.training.parallel import ALONE, Group
from mst.training.report import Reporter

if TYPE_CHECKING:
    import torch

    from mst.data.encode import Example
    from mst.plan import Plan
    from mst.request import TrainRequest


@dataclass(frozen=True)
class Session:
    """Everything that the loop's functions share; nothing in it is rebound.

    Attributes:
        model: prepared, on `device`.
        optimizer: over the trained weights.
        names: `id` of each trained weight to its name.
        device: where the batches go.
        dtype: of the matrix products.
        train: encoded rows.
        val: held-out rows, may be empty.
        pad_token_id: fills padded batches.
        packing: the model keeps packed rows apart.
        selective: the model computes logits at chosen positions only.
        plan: sizes and steps.
        request: schedule and cadence.
        checkpoints: directory of the checkpoints.
        reporter: told of each step, evaluation and save.
        stop_asked: True once the user wants the run to end.
        group: this process's place among the ranks.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    names: dict[int, str]
    device: torch.device
    dtype: torch.dtype
    train: Sequence[Example]
    val: Sequence[Example]
    pad_token_id: int
    packing: bool
    selective: bool
    plan: Plan
    request: TrainRequest
    checkpoints: Path
    reporter: Reporter
    stop_asked: Callable[[], bool]
    group: Group = ALONE


def make_optimizer(
    model: torch.nn.Module, request: TrainRequest, rate: float
) -> torch.optim.Optimizer:
    """Return AdamW over the trained weights; norms and biases don't decay, as in transformers."""
    import torch

    decayed: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for _, parameter in trained_parameters(model):
        (decayed if parameter.ndim >= 2 else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": request.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=rate,
        betas=(request.adam_beta1, request.adam_beta2),
        eps=request.adam_epsilon,
    )


def make_session(
    model: torch.nn.Module,
    device: torch.device,
    packing: bool,
    train: Sequence[Example],
    val: Sequence[Example],
    pad_token_id: int,
    plan: Plan,
    request: TrainRequest,
    checkpoints: Path,
    reporter: Reporter,
    stop_asked: Callable[[], bool],
    group: Group = ALONE,
) -> Session:
    """Gather what the loop needs, with a fresh optimizer.

    Raises:
        TrainingError: the model does not sit on the device that was asked for.
    """
    import torch

    check_placement(model, device)

    return Session(
        model=model,
        optimizer=make_optimizer(model, request, plan.learning_rate),
        names={id(parameter): name for name, parameter in trained_parameters(model)},
        device=device,
        dtype=getattr(torch, plan.compute_dtype),
        train=train,
        val=val,
        pad_token_id=pad_token_id,
        packing=packing,
        selective=keeps_logits(model),
        plan=plan,
        request=request,
        checkpoints=checkpoints,
        reporter=reporter,
        stop_asked=stop_asked,
        group=group,
    )


def check_placement(model: torch.nn.Module, device: torch.device) -> None:
    """Make sure that every weight and buffer is where the plan put it.

    Other tools trained on the CPU without a word when they didn't know the chip.

    Raises:
        TrainingError: something is elsewhere; names it.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != device:
            raise TrainingError(
                f"the plan says {device}, but {name} is on {tensor.device}: the backend's torch"
                " extension did not move it. `mst backend check` tests the backend."
            )
