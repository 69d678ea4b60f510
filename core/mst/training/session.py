"""What a training loop works with: model, optimizer, rows, plan, and its place among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.errors import TrainingError
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.training import zero as sharded
from mst.training.adapters import trained_parameters
from mst.training.batches import Layout, layout_of
from mst.training.loss import Logits, compute_in, logits_of
from mst.training.objectives import find_objective
from mst.training.optimizers import make_optimizer
from mst.training.order import RowSizes, row_sizes
from mst.training.output_head import head_form
from mst.training.parallel import ALONE, Group
from mst.training.reference import Reference, frozen_copy, precomputed
from mst.training.report import Reporter

if TYPE_CHECKING:
    import torch

    from mst.data.encode import Example
    from mst.data.tokens import TextTokenizer
    from mst.objective import Objective
    from mst.plan import Plan
    from mst.request import TrainRequest
    from mst.training.private_step import Private


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
        layout: how the rows of a micro-batch lie in its tensors.
        shares: what they begin with alike is computed once.
        sizes: of the training rows, by which they are arranged.
        logits: how they are had.
        plan: sizes and steps.
        request: schedule and cadence.
        checkpoints: directory of the checkpoints.
        reporter: told of each step, evaluation and save.
        stop_asked: True once the user wants the run to end.
        objective: what the model is trained for.
        reference: how the model before training is known; None when the objective needs it not.
        tokenizer: of an objective that samples answers; others do without.
        processor: directory of the model that reads the rows' images; None where there are none.
        group: this process's place among the ranks.
        zero: what DeepSpeed holds, when the plan's strategy is ZeRO; `model` is its engine then,
            and `optimizer` its own.
        private: what steps with differential privacy need; None without.
        keys: of an encrypted run; empty on ranks that write nothing.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    names: dict[int, str]
    device: torch.device
    dtype: torch.dtype
    train: Sequence[Example]
    val: Sequence[Example]
    pad_token_id: int
    layout: Layout
    sizes: RowSizes
    logits: Logits
    plan: Plan
    request: TrainRequest
    checkpoints: Path
    reporter: Reporter
    stop_asked: Callable[[], bool]
    objective: Objective
    reference: Reference | None = None
    tokenizer: TextTokenizer | None = None
    processor: Path | None = None
    group: Group = ALONE
    zero: sharded.Zero | None = None
    private: Private | None = None
    keys: KeyRing = NO_KEYS
    shares: bool = False


def make_session(
    model: torch.nn.Module,
    device: torch.device,
    plan: Plan,
    request: TrainRequest,
    *,
    packing: bool,
    train: Sequence[Example],
    pad_token_id: int,
    checkpoints: Path,
    reporter: Reporter,
    stop_asked: Callable[[], bool],
    val: Sequence[Example] = (),
    group: Group = ALONE,
    zero_config: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
    tokenizer: TextTokenizer | None = None,
    processor: Path | None = None,
    keys: KeyRing = NO_KEYS,
    layout: Layout | None = None,
    shares: bool = False,
    logits: Logits | None = None,
) -> Session:
    """Gather what the loop needs, with a fresh optimizer; the model is as it was before training.

    With `zero_config` the model is handed to DeepSpeed; for stage 3 it may lie on the host. The
    default of `objective` is the built-in one that the request names. Where it needs the model
    before training, that is the base under the adapter, a frozen copy, or, when the request wants
    it, log-probabilities that are computed here. The default of `logits` is what `logits_in` says,
    and that of `layout` the one of layers that are not compiled.

    Raises:
        TrainingError: the model does not sit on the device that was asked for.
    """
    import torch

    # DeepSpeed moves the weights of stage 3 itself.
    check_placement(model, torch.device("cpu") if plan.strategy == "zero3" else device)
    objective = objective or find_objective(request)
    optimizer = make_optimizer(model, request, plan.learning_rate, plan.optim)
    zero = None
    if zero_config is not None:
        zero = sharded.start(model, optimizer, zero_config, device, group)
        optimizer = zero.engine.optimizer
    session = Session(
        model=zero.engine if zero else model,
        optimizer=optimizer,
        names={id(parameter): name for name, parameter in trained_parameters(model)},
        device=device,
        dtype=getattr(torch, plan.compute_dtype),
        train=train,
        val=val,
        pad_token_id=pad_token_id,
        layout=layout or layout_of(packing and not objective.scores, plan.attention),
        shares=shares and packing,
        sizes=row_sizes(train, plan.max_length if request.packing else None),
        logits=logits or logits_in(model, device, plan),
        plan=plan,
        request=request,
        checkpoints=checkpoints,
        reporter=reporter,
        stop_asked=stop_asked,
        objective=objective,
        tokenizer=tokenizer,
        processor=processor,
        group=group,
        zero=zero,
        keys=keys,
    )
    if not session.objective.reference:
        return session
    session = replace(session, reference=_reference(session))
    return _with_notes(session) if request.precompute_ref_log_probs else session


def logits_in(model: torch.nn.Module, device: torch.device, plan: Plan) -> Logits:
    """Return how a model's logits are had in a plan: a few labels at a time, if it can be."""
    import torch

    if not plan.chunked_loss:
        return logits_of(model)
    with compute_in(model, device.type, getattr(torch, plan.compute_dtype)):
        return head_form(model, device) or logits_of(model)


def _reference(session: Session) -> Reference:
    with_adapter = session.plan.tuner != "full"
    if with_adapter or session.request.precompute_ref_log_probs:
        return Reference()
    return Reference(frozen_copy(session.model))


def _with_notes(session: Session) -> Session:
    notes = precomputed(session, [*session.train, *session.val])
    return replace(session, reference=Reference(notes=notes))


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
