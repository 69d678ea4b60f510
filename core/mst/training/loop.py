"""The training loop: exact resume, loss averaged over the global batch's tokens, any device."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mst.errors import PeerFailed, TrainingError
from mst.training import checkpoint, faults, parallel, precision
from mst.training.adapters import trained_parameters
from mst.training.batches import Batch, collate, step_micro_batches
from mst.training.checkpoint import TrainState
from mst.training.loss import compute_in, summed_loss
from mst.training.report import EvalMetrics, StepMetrics
from mst.training.schedule import learning_rate_factor, warmup_steps
from mst.training.session import Session


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: "done", "interrupted" or "early" (early stopping), and where."""

    ending: str
    state: TrainState


def run(session: Session, state: TrainState) -> Outcome:
    """Train from `state` to the plan's last step.

    Raises:
        TrainingError: the loss or the gradients stopped being finite, memory ran out, the device
            was lost, or a save failed.
        PeerFailed: on a rank that has nothing to say, because another one raised.
    """
    plan, request = session.plan, session.request
    saved_at = state.step
    ending = "done"
    while state.step < plan.total_steps:
        if parallel.highest(session.group, int(session.stop_asked())):
            ending = "interrupted"
            break
        try:
            with faults.named(session.device, f"in step {state.step + 1}"):
                state = _one_step(session, state)
        except _Agreed as error:
            if saved_at != state.step and _weights_are_finite(session):
                _save(session, state)
            raise error.reason if session.group.first else PeerFailed from None
        last = state.step == plan.total_steps
        if session.val and (last or _due(state.step, request.eval_steps, plan.steps_per_epoch)):
            with faults.named(session.device, f"in the evaluation after step {state.step}"):
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


class _Agreed(Exception):
    """Every rank has come to the same end, with whole weights; rank 0 tells the reason."""

    def __init__(self, reason: TrainingError) -> None:
        super().__init__()
        self.reason = reason


def _weights_are_finite(session: Session) -> bool:
    import torch

    return all(bool(torch.isfinite(p).all()) for _, p in trained_parameters(session.model))


def _due(step: int, every: int | None, steps_per_epoch: int) -> bool:
    return step % (every or steps_per_epoch) == 0


def _save(session: Session, state: TrainState) -> None:
    directory = session.checkpoints
    with faults.named(session.device, f"while step {state.step} was being saved"):
        random = parallel.gathered(session.group, checkpoint.random_states(session.device))
        if not session.group.first:
            return
        checkpoint.save(directory, state, session.model, session.optimizer, session.names, random)
    checkpoint.prune(directory, session.request.save_total_limit, state.best_step)
    session.reporter.saved(state.step)


def _micro_batch(session: Session, state: TrainState) -> int:
    return state.micro_batch or session.plan.per_device_train_batch_size


def _batches(session: Session, state: TrainState) -> list[Batch]:
    """Return this rank's micro-batches of the next step."""
    chosen = step_micro_batches(
        len(session.train),
        state.step,
        _micro_batch(session, state),
        session.plan.global_batch,
        session.request.seed,
    )
    own = chosen[session.group.rank :: session.group.world_size]
    return [
        collate([session.train[i] for i in rows], session.pad_token_id, session.packing)
        for rows in own
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
    """Take one optimizer step; the weights are untouched when it raises _Agreed."""
    import torch

    began = time.perf_counter()
    scale = state.loss_scale or precision.first_scale(session.plan.compute_dtype)
    while True:
        batches = _batches(session, state)
        label_tokens, tokens = parallel.summed(
            session.group,
            [sum(each.label_tokens for each in batches), sum(each.tokens for each in batches)],
        )
        loss = _gradients(session, batches, label_tokens, scale)
        if loss is None:
            state = _shrunk(session, state)
            continue
        weights = [p for group in session.optimizer.param_groups for p in group["params"]]
        parallel.sum_gradients(session.group, weights)
        (loss_sum,) = parallel.summed(session.group, [loss])
        if scale != 1:
            for each in weights:
                if each.grad is not None:
                    each.grad.mul_(1 / scale)
        norm = float(
            torch.nn.utils.clip_grad_norm_(weights, session.request.max_grad_norm or math.inf)
        )
        if math.isfinite(loss_sum) and math.isfinite(norm):
            break
        smaller = precision.after_overflow(scale) if math.isfinite(loss_sum) else None
        if smaller is None:
            raise _Agreed(_not_finite(state.step + 1, loss_sum, norm))
        scale = smaller
        state = replace(state, loss_scale=scale, good_steps=0)
    rate = _set_rate(session, state.step)
    session.optimizer.step()
    scale, good = precision.after_good_step(scale, state.good_steps, session.plan.compute_dtype)
    seconds = time.perf_counter() - began
    state = replace(
        state,
        step=state.step + 1,
        tokens=state.tokens + int(tokens),
        train_seconds=state.train_seconds + seconds,
        loss_scale=scale,
        good_steps=good,
    )
    session.reporter.step(
        StepMetrics(
            step=state.step,
            epoch=round(state.step / session.plan.steps_per_epoch, 4),
            loss=loss_sum,
            learning_rate=rate,
            grad_norm=norm,
            tokens=state.tokens,
            tokens_per_second=tokens / seconds,
        )
    )
    return state


def _gradients(
    session: Session, batches: Sequence[Batch], label_tokens: float, scale: float
) -> float | None:
    """Leave the gradients of this rank's micro-batches, times `scale`, and return their loss.

    Returns:
        The rank's part of the mean over `label_tokens`; None when any rank ran out of memory.
    """
    import torch

    session.optimizer.zero_grad(set_to_none=True)
    full = False
    total = torch.zeros((), device=session.device)
    try:
        for batch in batches:
            with compute_in(session.model, session.device.type, session.dtype):
                loss = summed_loss(session.model, batch.to(session.device), session.selective)
            loss = loss / label_tokens
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            del loss
        value = float(total)
    except RuntimeError as error:
        if not faults.is_out_of_memory(error):
            raise
        full = True
    if parallel.highest(session.group, int(full)):
        return None
    return value


def _shrunk(session: Session, state: TrainState) -> TrainState:
    """Return the state with half the micro-batch, after a step that did not fit.

    Raises:
        _Agreed: the user did not ask for this, or there is nothing left to halve.
    """
    session.optimizer.zero_grad(set_to_none=True)
    faults.free_memory(session.device)
    size = _micro_batch(session, state)
    if session.request.on_oom != "shrink" or size == 1:
        raise _Agreed(
            faults.too_large(session.device, state.step + 1, size, session.plan, session.request)
        )
    session.reporter.shrunk(state.step + 1, size, size // 2)
    return replace(state, micro_batch=size // 2)


def _not_finite(step: int, loss: float, norm: float) -> TrainingError:
    what = "loss" if not math.isfinite(loss) else "gradient norm"
    return TrainingError(
        f"the {what} is not finite at step {step} (loss {loss}, gradient norm {norm})."
        " The last good weights are in the newest checkpoint."
        " Try a lower --learning-rate, a longer --warmup-ratio, or --dtype float32."
    )


def _evaluated(session: Session, state: TrainState) -> TrainState:
    loss = held_out_loss(session, state.micro_batch)
    epoch = round(state.step / session.plan.steps_per_epoch, 4)
    session.reporter.evaluation(EvalMetrics(state.step, epoch, loss))
    if state.best_loss is None or loss < state.best_loss:
        return replace(state, best_step=state.step, best_loss=loss, worse_evaluations=0)
    return replace(state, worse_evaluations=state.worse_evaluations + 1)


def held_out_loss(session: Session, micro_batch: int | None = None) -> float:
    """Return the mean cross-entropy over the label tokens of the held-out rows.

    Args:
        session: its ranks share the rows.
        micro_batch: rows at a time; default the plan's.
    """
    import torch

    size = micro_batch or session.plan.per_device_train_batch_size
    starts = range(0, len(session.val), size)[session.group.rank :: session.group.world_size]
    session.model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            for start in starts:
                rows = session.val[start : start + size]
                batch = collate(rows, session.pad_token_id, session.packing).to(session.device)
                with compute_in(session.model, session.device.type, session.dtype):
                    total += float(summed_loss(session.model, batch, session.selective))
                count += batch.label_tokens
    finally:
        session.model.train()
    total, count_sum = parallel.summed(session.group, [total, count])
    return total / count_sum
