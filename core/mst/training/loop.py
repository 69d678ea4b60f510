"""The training loop: exact resume, loss averaged over the global batch, any device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from mst.errors import PeerFailed, TrainingError
from mst.training import faults, parallel, precision, zero
from mst.training.adapters import trained_parameters
from mst.training.background_save import Writer, save
from mst.training.checkpoint import TrainState
from mst.training.device_memory import peak_bytes
from mst.training.evaluation import held_out
from mst.training.micro_batches import (
    LOSS,
    TOKENS,
    Share,
    add,
    counted,
    kindred,
    part_of,
    preludes,
    share_of,
    summed_names,
)
from mst.training.order import step_micro_batches, step_rows
from mst.training.private_step import clipped_sums, set_noisy_gradients
from mst.training.report import EvalMetrics, StepMetrics
from mst.training.schedule import learning_rate_factor, warmup_steps
from mst.training.session import Session

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: "done", "interrupted" or "early" (early stopping), and where.

    `evaluation` is the newest one; None when there was none since the run was begun or resumed.
    """

    ending: str
    state: TrainState
    evaluation: EvalMetrics | None = None


def run(session: Session, state: TrainState) -> Outcome:
    """Train from `state` to the plan's last step.

    Raises:
        TrainingError: the loss or the gradients stopped being finite, memory ran out, the device
            was lost, or a save failed.
        PeerFailed: on a rank that has nothing to say, because another one raised.
    """
    with Writer() as writer:
        return _run(session, state, writer)


def _run(session: Session, state: TrainState, writer: Writer) -> Outcome:
    plan, request = session.plan, session.request
    saved_at = state.step
    ending, evaluation = "done", None
    while state.step < plan.total_steps:
        writer.check()
        if parallel.highest(session.group, int(session.stop_asked())):
            ending = "interrupted"
            break
        try:
            with faults.named(session.device, f"in step {state.step + 1}"):
                state = _one_step(session, state)
        except _Agreed as error:
            if saved_at != state.step and error.whole and _weights_are_finite(session):
                save(session, state, writer)
            writer.wait()
            raise error.reason if session.group.first else PeerFailed from None
        last = state.step == plan.total_steps
        if session.val and (last or _due(state.step, request.eval_steps, plan.steps_per_epoch)):
            with faults.named(session.device, f"in the evaluation after step {state.step}"):
                state, evaluation = _evaluated(session, state)
            patience = request.early_stopping_patience
            if patience is not None and state.worse_evaluations >= patience:
                ending = "early"
        best = state.best_step == state.step
        if best or last or _due(state.step, request.save_steps, plan.steps_per_epoch):
            save(session, state, writer)
            saved_at = state.step
        if ending == "early":
            break
    if saved_at != state.step:
        save(session, state, writer)
    return Outcome(ending, state, evaluation)


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


def _micro_batch(session: Session, state: TrainState) -> int:
    return state.micro_batch or session.plan.per_device_train_batch_size


def _share(session: Session, state: TrainState) -> Share:
    """Return this rank's share of the next step."""
    sizes, batch, seed = session.sizes, session.plan.global_batch, session.request.seed
    size = _micro_batch(session, state)
    rows = [row for item in step_rows(sizes, state.step, batch, seed) for row in item]
    place = {row: number for number, row in enumerate(rows)}
    arrange = kindred(session.train, session.objective) if session.shares else None
    micros = [
        tuple(tuple(place[row] for row in item) for item in items)
        for items in step_micro_batches(
            sizes, state.step, size, batch, seed, session.layout, arrange
        )
    ]
    return share_of(session, [session.train[row] for row in rows], micros)


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
    """An optimizer step: loss, metrics, gradients' norm, tokens and float16's scale after it."""

    loss: float
    metrics: Mapping[str, float]
    norm: float
    tokens: float
    scale: float
    good_steps: int
    micro_batch: int | None


def _one_step(session: Session, state: TrainState) -> TrainState:
    """Take one optimizer step; the weights are untouched when it raises a whole _Agreed."""
    began = time.perf_counter()
    rate = _set_rate(session, state.step)
    take = _take_own if session.zero is None else _take_zero
    taken = (_take_private if session.private is not None else take)(session, state)
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
            memory_bytes=peak_bytes(session.device),
            metrics=taken.metrics,
        )
    )
    return state


def _take_own(session: Session, state: TrainState) -> _Taken:
    """Sum the gradients over the ranks, and let the optimizer step."""
    import torch

    scale = state.loss_scale or precision.first_scale(session.plan.compute_dtype)
    good = state.good_steps
    while True:
        share = _share(session, state)
        passed = _gradients(session, share, scale, state.step)
        if passed is None:
            state = _shrunk(session, state)
            continue
        weights = [p for group in session.optimizer.param_groups for p in group["params"]]
        parallel.sum_gradients(session.group, weights)
        sums = summed_names(session, share, passed)
        loss_sum, tokens = sums.pop(LOSS), sums.pop(TOKENS)
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
    return _Taken(loss_sum, sums, norm, tokens, scale, good, state.micro_batch)


def _take_zero(session: Session, state: TrainState) -> _Taken:
    """Let DeepSpeed reduce the gradients and step."""
    assert session.zero is not None
    share = _share(session, state)
    while True:
        with parallel.peers_may_fail(session.device):
            passed = _zero_gradients(session, state, share)
        sums = summed_names(session, share, passed)
        loss_sum, tokens = sums.pop(LOSS), sums.pop(TOKENS)
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
    return _Taken(loss_sum, sums, norm, tokens, scale, state.good_steps, state.micro_batch)


def _take_private(session: Session, state: TrainState) -> _Taken:
    """Clip each unit's gradient, add noise to their sum, and let the optimizer step."""
    private = session.private
    assert private is not None
    while True:
        work = partial(clipped_sums, session, private, state.step, _micro_batch(session, state))
        found = _within_memory(session, work)
        if found is not None:
            break
        private.rows.forget()
        state = _shrunk(session, state)
    norm = set_noisy_gradients(private, found.sums, state.step)
    if not math.isfinite(norm):
        raise _Agreed(_not_finite(state.step + 1, found.loss, norm))
    session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    metrics = {"units": float(found.units)}
    return _Taken(found.loss, metrics, norm, found.tokens, 1.0, 0, state.micro_batch)


def _zero_gradients(session: Session, state: TrainState, share: Share) -> dict[str, float]:
    """Leave the gradients with DeepSpeed and return this rank's part of the loss and metrics.

    Raises:
        OutOfMemory: on this rank alone: the others are in a collective, and end with it.
    """
    assert session.zero is not None
    passed: dict[str, float] = {}
    try:
        before, sums = preludes(session, share, state.step)
        known = counted(session, share, sums)
        for place, each in enumerate(before):
            part = part_of(session, each, known)
            counts = place < share.own
            zero.backward(session.zero, part.loss * counts)
            if counts:
                add(passed, {LOSS: part.loss.detach(), **part.metrics})
            del part
    except RuntimeError as error:
        if not faults.is_out_of_memory(error):
            raise
        size = _micro_batch(session, state)
        raise faults.too_large(
            session.device, state.step + 1, size, session.plan, session.request
        ) from None
    return passed


def _gradients(session: Session, share: Share, scale: float, step: int) -> dict[str, float] | None:
    """Leave the gradients of this rank's micro-batches, times `scale`, and return what they gave.

    Returns:
        The rank's part of the loss and the metrics; None when any rank ran out of memory.
    """
    session.optimizer.zero_grad(set_to_none=True)
    if session.objective.before is None:  # nothing that memory could run out in
        before, sums = preludes(session, share, step)
    else:
        found = _within_memory(session, lambda: preludes(session, share, step))
        if found is None:
            return None
        before, sums = found
    known = counted(session, share, sums)

    def passes() -> dict[str, float]:
        added: dict[str, Any] = {}
        for each in before:
            part = part_of(session, each, known)
            (part.loss * scale).backward()  # type: ignore[no-untyped-call]
            # On the device: a value on the host would wait for it after every micro-batch.
            for name, value in (LOSS, part.loss.detach()), *part.metrics.items():
                added[name] = added.get(name, 0.0) + value
            del part
        return {name: float(value) for name, value in added.items()}

    return _within_memory(session, passes)


def _within_memory(session: Session, work: Callable[[], T]) -> T | None:
    """Return what `work` returns; None when any rank ran out of memory in it."""
    found: T | None = None
    try:
        found = work()
    except RuntimeError as error:
        if not faults.is_out_of_memory(error):
            raise
    if parallel.highest(session.group, int(found is None)):
        return None
    return found


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


def _evaluated(session: Session, state: TrainState) -> tuple[TrainState, EvalMetrics]:
    loss, metrics = held_out(session, state.micro_batch)
    epoch = round(state.step / session.plan.steps_per_epoch, 4)
    found = EvalMetrics(state.step, epoch, loss, metrics)
    session.reporter.evaluation(found)
    goal = session.objective.goal
    judged = -metrics[goal] if goal else loss
    if state.best_loss is None or judged < state.best_loss:
        return replace(state, best_step=state.step, best_loss=judged, worse_evaluations=0), found
    return replace(state, worse_evaluations=state.worse_evaluations + 1), found
