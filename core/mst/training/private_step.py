"""An optimizer step's gradients with differential privacy.

Each unit's gradient is the mean over its rows, clipped to a norm; the sum over the drawn units gets
noise, and is divided by how many are drawn on average, which is no secret.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1, with Poisson
sampling as in Mironov, Talwar and Zhang 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import RunError
from mst.plan import PrivacyBudget
from mst.privacy.draws import KEY_FILE, drawn_units, make_key, normal_draws, read_key
from mst.privacy.units import grouped
from mst.training.micro_batches import row_losses
from mst.training.row_gradients import RowGradients, check_row_gradients

if TYPE_CHECKING:
    import torch

    from mst.training.session import Session


@dataclass(frozen=True)
class Private:
    """What private steps need beside the session.

    Attributes:
        budget: noise, clipping norm and sampling.
        key: of the run's draws.
        units: places in the training rows, of each unit.
        rows: hooks on the model.
    """

    budget: PrivacyBudget
    key: bytes = field(repr=False)
    units: Sequence[Sequence[int]]
    rows: RowGradients


@dataclass(frozen=True)
class Clipped:
    """What the drawn units gave.

    Attributes:
        sums: of their clipped gradients, float32, one a weight.
        loss: mean over the units of their rows' mean loss; 0 where none was drawn.
        units: how many were drawn.
        tokens: that the model read, padding not counted.
    """

    sums: list[torch.Tensor]
    loss: float
    units: int
    tokens: int


@dataclass(frozen=True)
class _Part:
    """A row of a drawn unit: its place in the training rows, its unit, and its share of that."""

    row: int
    unit: int
    share: float


def begin_private_steps(
    session: Session, budget: PrivacyBudget, run: Path, resumed: bool
) -> Private:
    """Hook into the model, prove that rows' gradients stay apart, and take or make the run's key.

    Args:
        session: about to train.
        budget: as planned.
        run: the run directory.
        resumed: steps were taken before.

    Raises:
        TrainingError: the model lets rows meet.
        RunError: the run goes on, and its key is missing; or the units are not those planned with.
    """
    units = grouped(each.row for each in session.train)
    if len(units) != budget.units:
        raise RunError(
            f"the run was planned for {budget.units} units, and the data has {len(units)}, so its ε"
            " would not hold. Start a new run in another --output-dir."
        )
    rows = RowGradients(session.model)
    check_row_gradients(session, rows)
    # A run that was killed before its first checkpoint has a key, and has shown nothing yet.
    known = resumed or (run / KEY_FILE).exists()
    key = read_key(run) if known else make_key(run)
    return Private(budget, key, units, rows)


def clipped_sums(session: Session, private: Private, step: int, micro_batch: int) -> Clipped:
    """Return the sum of the clipped gradients of the units that are drawn for a step.

    Args:
        session: model and rows.
        private: what private steps need.
        step: optimizer step, from 0.
        micro_batch: rows that pass through the model at once; makes no difference but in rounding.
    """
    import torch

    budget, rows = private.budget, private.rows
    drawn = drawn_units(private.key, step, len(private.units), budget.sample_rate)
    parts = [
        _Part(row, unit, 1 / len(private.units[unit]))
        for unit in drawn
        for row in private.units[unit]
    ]
    sums = [torch.zeros_like(each, dtype=torch.float32) for each in rows.weights]
    loss, tokens = 0.0, 0
    begun: list[torch.Tensor] | None = None
    for first in range(0, len(parts), micro_batch):
        micro = parts[first : first + micro_batch]
        examples = [session.train[each.row] for each in micro]
        shares = torch.tensor([each.share for each in micro], device=session.device)
        weighted = row_losses(session, examples) * shares
        rows.backward(weighted.sum())
        loss += float(weighted.detach().sum())
        tokens += sum(len(each.input_ids) for each in examples)
        rest = parts[first + micro_batch : first + micro_batch + 1]
        begun = _add(rows, micro, rest, begun, sums, budget.max_grad_norm)
    return Clipped(sums, loss / max(1, len(drawn)), len(drawn), tokens)


def _add(
    rows: RowGradients,
    micro: Sequence[_Part],
    rest: Sequence[_Part],
    begun: list[torch.Tensor] | None,
    sums: Sequence[torch.Tensor],
    most: float,
) -> list[torch.Tensor] | None:
    """Add the clipped gradients of the units that end in a micro-batch to the sums.

    Args:
        rows: hold the gradient of each row, times the row's share of its unit.
        micro: the rows.
        rest: the row after them, if there is one.
        begun: gradient of a unit that began in the micro-batch before, one a weight.
        sums: what is added to.
        most: norm to which a unit's gradient is clipped.

    Returns:
        The gradient of a unit that goes on in the next micro-batch.
    """
    import torch

    place: dict[int, int] = {}
    for each in micro:
        place.setdefault(each.unit, len(place))
    of = torch.tensor([place[each.unit] for each in micro], device=sums[0].device)
    gradients = [torch.zeros(len(place), *each.shape, device=each.device) for each in sums]
    for gradient, taken in zip(gradients, rows.taken(), strict=True):
        if taken is not None:
            gradient.index_add_(0, of, taken.float())
    if begun is not None:
        for gradient, earlier in zip(gradients, begun, strict=True):
            gradient[0] += earlier
    goes_on = bool(rest) and rest[0].unit == micro[-1].unit
    left = [each[-1].clone() for each in gradients] if goes_on else None
    whole = [each[: len(place) - goes_on] for each in gradients]
    squares = torch.stack([each.flatten(1).square().sum(1) for each in whole])
    norms = squares.sum(0).sqrt()
    # As Opacus has it: rounding can't bring the norm above the bound.
    factors = (most / (norms + 1e-6)).clamp(max=1.0)
    finite = torch.isfinite(norms)
    for total, gradient in zip(sums, whole, strict=True):
        # What is not finite would be so after clipping too, and give its unit away.
        total += torch.einsum("u,u...->...", factors[finite], gradient[finite])
    return left


def set_noisy_gradients(private: Private, sums: Sequence[torch.Tensor], step: int) -> float:
    """Give each weight its noisy mean gradient, and return the norm of all of them.

    Args:
        private: noise, clipping norm, and how many units are drawn on average.
        sums: of the clipped gradients.
        step: optimizer step, from 0.
    """
    import torch

    budget = private.budget
    draw = normal_draws(private.key, step)
    deviation = budget.noise_multiplier * budget.max_grad_norm
    expected = budget.sample_rate * budget.units
    squares = 0.0
    for weight, total in zip(private.rows.weights, sums, strict=True):
        noise = draw(total.numel()).view(total.shape).to(total.device, torch.float64)
        noisy = (total.double() + deviation * noise) / expected
        weight.grad = noisy.to(weight.dtype)
        squares += float(noisy.square().sum())
    return float(squares**0.5)
