"""What the model said before training: its adapter switched off, a frozen copy, or notes of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mst.objective import Scored, label_count
from mst.training import parallel
from mst.training.loss import compute_in
from mst.training.scoring import Laid, lay_out, scored

if TYPE_CHECKING:
    import torch

    from mst.data.encode import Example
    from mst.training.session import Session


@dataclass(frozen=True)
class Reference:
    """How the reference is known.

    Attributes:
        copy: the model as it was, frozen; None where switching the adapter off gives it.
        notes: log-probabilities of each labelled token of a row's sequences, computed before
            training; by the `id` of the row's example, which the session keeps alive.
    """

    copy: torch.nn.Module | None = None
    notes: Mapping[int, torch.Tensor] = field(default_factory=dict, repr=False)


@contextlib.contextmanager
def as_before(model: torch.nn.Module) -> Iterator[None]:
    """Let a model with adapters compute as its base, in evaluation mode.

    Evaluation mode, for dropout would make the reference another one each time; it draws no
    random number either, so that the step's own draws stay what they were.
    """
    inner: Any = getattr(model, "module", model)  # of DeepSpeed's engine
    training = model.training
    model.eval()
    try:
        with inner.disable_adapter() if hasattr(inner, "peft_config") else contextlib.nullcontext():
            yield
    finally:
        model.train(training)


def frozen_copy(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy that nothing trains, in evaluation mode."""
    found = copy.deepcopy(model).requires_grad_(False)
    return found.eval()


def reference_scores(session: Session, examples: Sequence[Example], laid: Laid) -> Scored:
    """Return what the model said of rows before training, without gradients.

    Args:
        session: has the reference.
        examples: the rows.
        laid: their sequences, on the device.
    """
    import torch

    known = session.reference
    assert known is not None
    if known.notes and all(id(each) in known.notes for each in examples):
        return _from_notes(known.notes, examples, laid)
    objective = session.objective
    how = session.logits, objective.scores, objective.temperature
    with torch.no_grad(), compute_in(session.model, session.device.type, session.dtype):
        if known.copy is not None:
            return scored(known.copy, laid, *how)
        with as_before(session.model):
            return scored(session.model, laid, *how)


def _from_notes(
    notes: Mapping[int, torch.Tensor], examples: Sequence[Example], laid: Laid
) -> Scored:
    import torch

    values = torch.cat([notes[id(each)] for each in examples]).to(laid.weights.device)
    places = laid.places.sort().values  # by sequence, whatever line it lies in
    spread = torch.zeros_like(laid.weights).flatten().scatter(0, places, values)
    lengths = (laid.weights > 0).sum(-1).float()
    return Scored(spread.view_as(laid.weights), laid.weights, lengths)


def precomputed(session: Session, examples: Sequence[Example]) -> dict[int, torch.Tensor]:
    """Return the log-probabilities of every label of `examples` before training.

    Every rank computes a share and gets all. They live in memory only: on disk they would tell
    of the rows.

    Args:
        session: its model is as it was before training.
        examples: rows to train on and held-out ones.
    """
    import torch

    size = session.plan.per_device_train_batch_size
    group, sequences = session.group, session.objective.sequences
    counts = [sum(label_count(one) for one in sequences(each)) for each in examples]
    found = torch.zeros(sum(counts))
    ends = torch.tensor(counts).cumsum(0).tolist()
    every = range(0, len(examples), size)
    starts = list(every[group.rank :: group.world_size])
    # Under ZeRO every rank makes as many passes; a row that is computed twice counts once.
    fillers = -(-len(every) // group.world_size) - len(starts) if session.zero else 0
    with torch.no_grad(), parallel.peers_may_fail(session.device):
        for start in starts + [0] * fillers:
            rows = examples[start : start + size]
            parts = [one for each in rows for one in sequences(each)]
            laid = lay_out(parts, session.pad_token_id, session.layout, shares=session.shares).to(
                session.device
            )
            with (
                compute_in(session.model, session.device.type, session.dtype),
                as_before(session.model),
            ):
                values = scored(session.model, laid, session.logits, False).log_probs
            if start or group.first:
                first = ends[start] - counts[start]
                kept = values.flatten()[laid.places.sort().values].cpu()
                found[first : first + len(kept)] = kept
    shared = parallel.summed_tensor(group, found)
    return {
        id(each): shared[end - count : end]
        for each, end, count in zip(examples, ends, counts, strict=True)
    }
