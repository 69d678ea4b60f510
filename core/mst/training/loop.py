"""The training loop: exact resume, loss averaged over the global batch's tokens, any device."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mst.errors import PeerFailed, TrainingError
from mst.training import checkpoint, faults, parallel, precision, zero
from mst.training.adapters import trained_parameters
from mst.training.batches import Batch, collate, collate_lines
from mst.training.checkpoint import TrainState
from mst.training.loss import compute_in, summed_loss
from mst.training.order import step_micro_batches
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
            if saved_at != state.step and error.whole and _weights_are_finite(session):
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
    """Every rank has come to the same end; rank 0 tells the reason, after a save when `whole`."""

    def __init__(self, reason: TrainingError, whole: bool = True) -> None:
        super().__init__()
        self.reason = reason
        self.whole = whole


def _weights_are_finite(session: Session) -> bool:
    import torch

    if session.zero is not None:  # a share each; DeepSpeed has not stepped yet
        return True
    return all(bool(torch.isfinite(p).all()) for _, p in trained_parameters(session.model))


def _due(step: int, every: int | None, steps_per_epoch: int) -> bool:
    return step % (every or steps_per_epoch) == 0


def _save(session: Session, state: TrainState) -> None:
    directory = session.checkpoints
    with faults.named(session.device, f"while step {state.step} was being saved"):
        random = parallel.gathered(session.group, checkpoint.random_states(session.device))
        shares = None
        if session.zero is not None:
            weights = zero.weights(session.zero, session.group)
            shares = weights, zero.optimizer_tensors(session.zero, session.group)
        if not session.group.first:
            return
        model = session.zero.engine.module if session.zero else session.model
        checkpoint.save(directory, state, model, session.optimizer, session.names, random, shares)
    checkpoint.prune(directory, session.request.save_total_limit, state.best_step)
    session.reporter.saved(state.step)


def _micro_batch(session: Session, state: TrainState) -> int:
    return state.micro_batch or session.plan.per_device_train_batch_size


def _batches(session: Session, state: TrainState) -> tuple[list[Batch], int]:
    """Return this rank's micro-batches of the next step, and how many of them count.

    DeepSpeed wants as many passes of every rank: those with fewer rows repeat some of another's,
    which count for nothing.
    """
    chosen = step_micro_batches(
        session.sizes,
        state.step,
        _micro_batch(session, state),
        session.plan.global_batch,
        session.request.seed,
        session.layout,
    )
    own = chosen[session.group.rank :: session.group.world_size]
    count = len(own)
    if session.zero is not None:
        own += chosen[:1] * (-(-len(chosen) // session.group.world_size) - count)
    return [_batch(session, items) for items in own], count


def _batch(session: Session, items: Sequence[Sequence[int]]) -> Batch:
    """Return the tensors of a micro-batch of rows; each block of rows gets a line of its own."""
    examples = [[session.train[row] for row in rows] for rows in items]
    if session.sizes.block is not None and session.layout == "lines":
        return collate_lines(examples, session.pad_token_id, session.layout)
    whole = [each for rows in examples for each in rows]
    return collate(whole, session.pad_token_id, session.layout)


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


@dataclass(frozen=True)
class _Taken:
    """An optimizer step: its loss, its gradients' norm, its tokens and float16's scale after it."""

    loss: float
    norm: float
    tokens: float
    scale: float
    good_steps: int
    micro_batch: int | None


def _one_step(session: Session, state: TrainState) -> TrainState:
    """Take one optimizer step; the weights are untouched when it raises a whole _Agreed."""
    began = time.perf_counter()
    rate = _set_rate(session, state.step)
    taken = _take_own(session, state) if session.zero is None else _take_zero(session, state)
    seconds = time.perf_counter() - began
    state = replace(
        state,
        step=state.step + 1,
        tokens=state.tokens + int(taken.tokens),
        train_seconds=state.train_seconds + seconds,
        loss_scale=taken.scale,
        good_steps=taken.good_steps,
        micro_batch=taken.micro_batch,
    )
    session.reporter.step(
        StepMetrics(
            step=state.step,
            epoch=round(state.step / session.plan.steps_per_epoch, 4),
            loss=taken.loss,
            learning_rate=rate,
            grad_norm=taken.norm,
            tokens=state.tokens,
            tokens_per_second=taken.tokens / seconds,
        )
    )
    return state


def _take_own(session: Session, state: TrainState) -> _Taken:
    """Sum the gradients over the ranks, and let the optimizer step."""
    import torch

    scale = state.loss_scale or precision.first_scale(session.plan.compute_dtype)
    good = state.good_steps
    while True:
        batches, own = _batches(session, state)
        label_tokens, tokens = _counted(session, batches, own)
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
        scale, good = smaller, 0
    session.optimizer.step()
    scale, good = precision.after_good_step(scale, good, session.plan.compute_dtype)
    return _Taken(loss_sum, norm, tokens, scale, good, state.micro_batch)


def _counted(session: Session, batches: Sequence[Batch], own: int) -> list[float]:
    """Return the label tokens and the tokens of the step, of all ranks' own micro-batches."""
    mine = batches[:own]
    sums = [sum(each.label_tokens for each in mine), sum(each.tokens for each in mine)]
    return parallel.summed(session.group, sums)


def _take_zero(session: Session, state: TrainState) -> _Taken:
    """Let DeepSpeed reduce the gradients and step."""
    assert session.zero is not None
    batches, own = _batches(session, state)
    label_tokens, tokens = _counted(session, batches, own)
    while True:
        with parallel.peers_may_fail(session.device):
            loss = _zero_gradients(session, state, batches, own, label_tokens)
        (loss_sum,) = parallel.summed(session.group, [loss])
        if not math.isfinite(loss_sum):
            raise _Agreed(_not_finite(state.step + 1, loss_sum, math.nan))
        scale = zero.loss_scale(session.zero)
        with parallel.peers_may_fail(session.device):
            norm, changed = zero.step(session.zero)
        if changed and math.isfinite(norm):
            break
        if changed or scale <= 1:
            # The weights have been changed by then: only what was saved before is whole.
            raise _Agreed(_not_finite(state.step + 1, loss_sum, norm), whole=False)
    scale = zero.loss_scale(session.zero)
    return _Taken(loss_sum, norm, tokens, scale, state.good_steps, state.micro_batch)


def _zero_gradients(
    session: Session,
    state: TrainState,
    batches: Sequence[Batch],
    own: int,
    label_tokens: float,
) -> float:
    """Leave the gradients with DeepSpeed and return this rank's part of the mean loss.

    Raises:
        OutOfMemory: on this rank alone: the others are in a collective, and end with it.
    """
    assert session.zero is not None
    total = 0.0
    try:
        for place, batch in enumerate(batches):
            with compute_in(session.model, session.device.type, session.dtype):
                loss = summed_loss(session.model, batch.to(session.device), session.selective)
            loss = loss * (place < own) / label_tokens
            zero.backward(session.zero, loss)
            total += float(loss.detach())
            del loss
    except RuntimeError as error:
        if not faults.is_out_of_memory(error):
            raise
        size = _micro_batch(session, state)
        raise faults.too_large(
            session.device, state.step + 1, size, session.plan, session.request
        ) from None
    return total


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
    every = range(0, len(session.val), size)
    starts = list(every[session.group.rank :: session.group.world_size])
    own = len(starts)
    if session.zero is not None:  # every rank makes as many passes
        starts += [0] * (-(-len(every) // session.group.world_size) - own)
    session.model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad(), parallel.peers_may_fail(session.device):
            for place, start in enumerate(starts):
                rows = session.val[start : start + size]
                batch = collate(rows, session.pad_token_id, session.layout).to(session.device)
                with compute_in(session.model, session.device.type, session.dtype):
                    loss = float(summed_loss(session.model, batch, session.selective))
                if place < own:
                    total += loss
                    count += batch.label_tokens
    finally:
        session.model.train()
    total, count_sum = parallel.summed(session.group, [total, count])
    return total / count_sum
