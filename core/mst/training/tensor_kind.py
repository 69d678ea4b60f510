"""What compiled layers are compiled for: tensors as most of a run's micro-batches have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import TYPE_CHECKING

from mst.training.batches import Layout, batch_shape, layout_of
from mst.training.micro_batches import block_lines, kindred
from mst.training.order import row_sizes, step_micro_batches
from mst.training.prefixes import LEAST_SHARED, common_length
from mst.training.scoring import lines_in

if TYPE_CHECKING:
    from mst.data.encode import Example
    from mst.objective import Objective
    from mst.plan import Plan
    from mst.request import TrainRequest
    from mst.training.shared_lines import Line

# Steps that are looked at. Rows come in a drawn order, so that the first ones are like all others.
_STEPS = 16
# Up to this width attention lays its blocks out once for all layers (`KEPT_SQUARES` of
# `mst.training.block_attention`), and a line's mask takes 4 MiB.
_SINGLE_LINE = 2048


@dataclass(frozen=True)
class TensorKind:
    """What compiled layers are given; with anything else a layer runs as it is.

    torch compiles anew for a single line, and where a mask is missing. Micro-batches are laid out
    alike so that one compilation, of tensors that no row is in, serves them all. It is the same in
    each run, so that a run that goes on computes what one that never stopped would have.

    Attributes:
        several: they have more than one line.
        masked: a mask says which positions see which.
    """

    several: bool
    masked: bool


def compiled_layout(
    plan: Plan,
    request: TrainRequest,
    objective: Objective,
    rows: Sequence[Example],
    held_out: Sequence[Example],
    shares: bool,
) -> Layout:
    """Return how rows lie that compiled layers are given, of a model that keeps them apart.

    In one line where attention takes no longer for that: what begins alike is there once and not
    once a line, and one line is padded less than several. All micro-batches must fit into one: a
    run's layers are compiled for one line or for several.

    Args:
        plan, request, objective, rows, shares: as of `tensor_kind`.
        held_out: rows that are evaluated, in micro-batches of as many.
    """
    layout = layout_of(True, plan.attention, compiled=True)
    if not (shares and plan.block_attention) or request.packing or objective.samples:
        return layout
    if row_sizes(rows, None).streamed or row_sizes(held_out, None).streamed:
        return layout
    together = plan.per_device_train_batch_size
    widest = max(_widest(each, objective, together) for each in (rows, held_out) if each)
    return "single" if widest <= _SINGLE_LINE else layout


def _widest(rows: Sequence[Example], objective: Objective, together: int) -> int:
    """Return how many tokens are computed of so many rows in one line, at the most.

    The longest ones meet, and share no more than what all rows begin with.
    """
    parts = [[one.input_ids for one in objective.sequences(row)] for row in rows]
    each = [one for part in parts for one in part]
    common = common_length(min(each), max(each))
    common = common if common >= LEAST_SHARED else 0
    longest = nlargest(together, (sum(len(one) - common for one in part) for part in parts))
    return sum(longest) + common


def tensor_kind(
    plan: Plan,
    request: TrainRequest,
    objective: Objective,
    rows: Sequence[Example],
    layout: Layout,
    shares: bool = False,
) -> TensorKind:
    """Return what most micro-batches of a run's first steps are.

    Args:
        plan: says how many rows a micro-batch has.
        request: says whether these are blocks of rows, and their order.
        objective: says which sequences of a row the model reads.
        rows: that are trained on.
        layout: of the micro-batches.
        shares: what they begin with alike is computed once.
    """
    if objective.samples:
        # Answers are not known yet; they end where they like, so that there is padding.
        together = plan.per_device_train_batch_size * len(objective.sequences(rows[0]))
        several = together > (2 if shares else 1)
        return TensorKind(several, together > 1 or plan.attention == "eager")
    sizes = row_sizes(rows, plan.max_length if request.packing else None)
    arrange = kindred(rows, objective) if shares else None
    found: Counter[TensorKind] = Counter()
    for step in range(min(_STEPS, plan.total_steps)):
        for items in step_micro_batches(
            sizes, step, plan.per_device_train_batch_size, plan.global_batch, request.seed,
            layout, arrange,
        ):  # fmt: skip
            examples = [rows[row] for item in items for row in item]
            sequences = [one for each in examples for one in objective.sequences(each)]
            own = None
            if request.packing and layout == "alike":
                own = block_lines(objective, examples, list(map(len, items)))
            lines = lines_in(sequences, layout, own, shares)
            found[kind_of(sequences, lines, layout, plan.attention)] += 1
    return found.most_common(1)[0][0]


def kind_of(
    sequences: Sequence[Example], lines: Sequence[Line], layout: Layout, attention: str
) -> TensorKind:
    """Return what a micro-batch's tensors are.

    transformers makes a mask where positions restart within a line or where one says what is
    padded, and leaves causal attention to sdpa's kernels elsewhere; its eager attention always has
    one.

    Args:
        sequences: of the micro-batch.
        lines: that they lie in.
        layout: that the lines are of.
        attention: transformers' implementation.
    """
    if any(any(line.shared) for line in lines):
        return TensorKind(len(lines) > 1, True)
    lengths = [[len(sequences[number].input_ids) for number in line.rows] for line in lines]
    shape = batch_shape(lengths, layout)
    ends_within = any(len(line) > 1 or sum(line) < shape.width for line in lengths)
    masked = shape.masked or (shape.packed and ends_within)
    return TensorKind(len(lines) > 1, masked or attention == "eager")
