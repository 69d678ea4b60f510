"""The training loop: one device, exact resume, loss averaged over the global batch's tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import TrainingError
from mst.training import checkpoint
from mst.training.adapters import trained_parameters
from mst.training.batches import Batch, collate, step_micro_batches
from mst.training.checkpoint import TrainState
from mst.training.loss import compute_in, keeps_logits, summed_loss
from mst.training.report import EvalMetrics, Reporter, StepMetrics
from mst.training.schedule import learning_rate_factor, warmup_steps

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


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: "done", "interrupted" or "early" (early stopping), and where."""

    ending: str
    state: TrainState


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


def run(session: Session, state: TrainState) -> Outcome:
    """Train from `state` to the plan's last step.

    Raises:
        TrainingError: the loss or the gradients stopped being finite, or a save failed.
    """
    plan, request = session.plan, session.request
    saved_at = state.step
    ending = "done"
    while state.step < plan.total_steps:
        if session.stop_asked():
            ending = "interrupted"
            break
        try:
            state = _one_step(session, state)
        except TrainingError:
            if saved_at != state.step and _weights_are_finite(session):
                _save(session, state)
            raise
        last = state.step == plan.total_steps
        if session.val and (last or _due(state.step, request.eval_steps, plan.steps_per_epoch)):
            state = _evaluated(session, state)
            patience = request.early_stopping_patience
            if patience is not None and state.worse_evaluations >= patience:
                ending = "early"
        best = state.best_step == state.step
        if best or last or _due(state.step, request.save_steps, plan.steps_per_epoch):
            _save(session, state)
            saved_at = state.step
        if ending == "early":
            break
    if saved_at != state.step:
        _save(session, state)
    return Outcome(ending, state)


def _weights_are_finite(session: Session) -> bool:
    import torch

    return all(bool(torch.isfinite(p).all()) for _, p in trained_parameters(session.model))


def _due(step: int, every: int | None, steps_per_epoch: int) -> bool:
    return step % (every or steps_per_epoch) == 0


def _save(session: Session, state: TrainState) -> None:
    directory = session.checkpoints
    checkpoint.save(
        directory, state, session.model, session.optimizer, session.names, session.device
    )
    checkpoint.prune(directory, session.request.save_total_limit, state.best_step)
    session.reporter.saved(state.step)


def _batches(session: Session, step: int) -> list[Batch]:
    plan = session.plan
    chosen = step_micro_batches(
        len(session.train),
        step,
        plan.per_device_train_batch_size,
        plan.gradient_accumulation_steps,
        session.request.seed,
    )
    return [
        collate([session.train[i] for i in rows], session.pad_token_id, session.packing)
        for rows in chosen
    ]


def _set_rate(session: Session, step: int) -> float:
    plan, request = session.plan, session.request
    factor = learning_rate_factor(
        step,
        plan.total_steps,
        warmup_steps(plan.total_steps, request.warmup_ratio),
        request.lr_scheduler_type,
    )
    for group in session.optimizer.param_groups:
        group["lr"] = plan.learning_rate * factor
    return plan.learning_rate * factor


def _one_step(session: Session, state: TrainState) -> TrainState:
    """Take one optimizer step; the weights are untouched when it raises."""
    import torch

    began = time.perf_counter()
    batches = _batches(session, state.step)
    label_tokens = sum(each.label_tokens for each in batches)
    session.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=session.device)
    for batch in batches:
        with compute_in(session.model, session.device.type, session.dtype):
            loss = summed_loss(session.model, batch.to(session.device), session.selective)
        loss = loss / label_tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    weights = [p for group in session.optimizer.param_groups for p in group["params"]]
    limit = session.request.max_grad_norm or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(weights, limit))
    loss_value = float(total)
    number = state.step + 1
    if not (math.isfinite(loss_value) and math.isfinite(norm)):
        what = "loss" if not math.isfinite(loss_value) else "gradient norm"
        raise TrainingError(
            f"the {what} is not finite at step {number} (loss {loss_value}, gradient norm {norm})."
            " The last good weights are in the newest checkpoint."
            " Try a lower --learning-rate, a longer --warmup-ratio, or --dtype float32."
        )
    rate = _set_rate(session, state.step)
    session.optimizer.step()
    seconds = time.perf_counter() - began
    tokens = sum(each.tokens for each in batches)
    state = replace(
        state,
        step=number,
        tokens=state.tokens + tokens,
        train_seconds=state.train_seconds + seconds,
    )
    session.reporter.step(
        StepMetrics(
            step=number,
            epoch=round(number / session.plan.steps_per_epoch, 4),
            loss=loss_value,
            learning_rate=rate,
            grad_norm=norm,
            tokens=state.tokens,
            tokens_per_second=tokens / seconds,
        )
    )
    return state


def _evaluated(session: Session, state: TrainState) -> TrainState:
    loss = held_out_loss(session)
    epoch = round(state.step / session.plan.steps_per_epoch, 4)
    session.reporter.evaluation(EvalMetrics(state.step, epoch, loss))
    if state.best_loss is None or loss < state.best_loss:
        return replace(state, best_step=state.step, best_loss=loss, worse_evaluations=0)
    return replace(state, worse_evaluations=state.worse_evaluations + 1)


def held_out_loss(session: Session) -> float:
    """Return the mean cross-entropy over the label tokens of the held-out rows."""
    import torch

    size = session.plan.per_device_train_batch_size
    session.model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            for start in range(0, len(session.val), size):
                rows = session.val[start : start + size]
                batch = collate(rows, session.pad_token_id, session.packing).to(session.device)
                with compute_in(session.model, session.device.type, session.dtype):
                    total += float(summed_loss(session.model, batch, session.selective))
                count += batch.label_tokens
    finally:
        session.model.train()
    return total / count


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
) -> Session:
    """Gather what the loop needs, with a fresh optimizer."""
    import torch

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
    )
