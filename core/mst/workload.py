"""The encoded rows as the planner sees them: how many, how long, and how large a step gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from mst.configuration import ObjectiveWork
from mst.memory import StepShape
from mst.request import TrainRequest
from mst.training.batches import BatchShape, Layout, batch_shape, layout_of, lines_of
from mst.training.order import Arrange, RowSizes, step_micro_batches
from mst.training.packing import first_fit_decreasing
from mst.training.prefixes import Beginnings
from mst.training.shared_lines import kindred_shares, line_tokens, shared_lines, shared_shape

# Micro-batches of so many rows at the most are looked at for the largest; epochs only repeat it.
ROWS_LOOKED_AT = 300_000
# With rows that begin alike each takes some five times as long.
SHARING_ROWS_LOOKED_AT = 60_000
# Of these, so many say what share of a step's tokens is spared.
ROWS_AVERAGED = 4_000


@dataclass(frozen=True)
class DataFacts:
    """What the planner needs to know of the encoded rows.

    With `--packing` blocks of rows take the place of rows in `lengths` and `label_tokens`, and so
    in all that is computed from them.

    Attributes:
        lengths: tokens of each training row.
        label_tokens: of these, how many carry loss.
        val_rows: rows held out.
        answers: distinct answers when the set is a classification, else None.
        max_length: longest row that was accepted; of blocks, what each may hold.
        longest: longest row that was found, accepted or not.
        deleted: rows left out because they were longer.
        packed_rows: rows in all blocks; None without `--packing`.
        sampled_from: training rows in all, where `lengths` are those of a sample, because rows are
            streamed.
        parts: tokens of each sequence that the model reads of a row, which `lengths` sums up; empty
            where every row is one.
        sequences: how many those are of a row, at the most.
        unusable: rows left out because the objective can't learn from them.
        objective: what it asks for beside a pass over each row.
        images: how many images the rows have, those held out with them.
        image_bytes: of the tensors of each training row's images; empty where no row has one.
        units: what differential privacy protects one by one, in the training rows: rows, or who
            stands in them; 0 where nobody has counted.
        beginnings: which sequences begin alike, by their number over all rows; None where nobody
            has looked.
    """

    lengths: tuple[int, ...]
    label_tokens: tuple[int, ...]
    val_rows: int
    answers: int | None
    max_length: int
    longest: int
    deleted: int
    packed_rows: int | None = None
    sampled_from: int | None = None
    parts: tuple[tuple[int, ...], ...] = ()
    sequences: int = 1
    unusable: int = 0
    objective: ObjectiveWork = field(default_factory=ObjectiveWork)
    images: int = 0
    image_bytes: tuple[int, ...] = ()
    units: int = 0
    beginnings: Beginnings | None = field(default=None, repr=False)


def packed(data: DataFacts, block: int) -> DataFacts:
    """Return the data in blocks of at most `block` tokens, as `--packing` fills them."""
    blocks = first_fit_decreasing(data.lengths, block)
    return replace(
        data,
        lengths=tuple(sum(data.lengths[row] for row in rows) for rows in blocks),
        label_tokens=tuple(sum(data.label_tokens[row] for row in rows) for rows in blocks),
        max_length=block,
        packed_rows=len(data.lengths),
        parts=(),
    )


def layout_in(data: DataFacts, attention: str, padding_free: str = "auto") -> Layout:
    """Return how rows will lie in a micro-batch's tensors, of a model that keeps them apart.

    Args:
        data: the rows.
        attention: transformers' implementation.
        padding_free: as the user asked for it.
    """
    apart = bool(data.objective.scores or data.images or data.units or padding_free == "off")
    return layout_of(not apart, attention)


def epoch_items(data: DataFacts) -> int:
    """Return what an epoch visits: rows, blocks of rows, or units that privacy protects."""
    return data.units or data.sampled_from or len(data.lengths)


def train_rows(data: DataFacts) -> int:
    """Return how many rows are trained on."""
    return data.packed_rows or data.sampled_from or len(data.lengths)


def rows_a_unit(data: DataFacts) -> float:
    """Return the rows, or blocks, of what an epoch visits: 1, but where units have several."""
    return len(data.lengths) / data.units if data.units else 1.0


def mean_length(data: DataFacts) -> float:
    """Return the tokens of an average row, or block."""
    return sum(data.lengths) / len(data.lengths)


def mean_label_tokens(data: DataFacts) -> float:
    """Return how many tokens of an average row, or block, carry loss."""
    return sum(data.label_tokens) / len(data.label_tokens)


def objective_costs(data: DataFacts, request: TrainRequest, tuner: str) -> dict[str, Any]:
    """Return the fields of a `Configuration` that the objective decides."""
    work = data.objective
    live = work.reference and not request.precompute_ref_log_probs
    # What comes before the gradients asks the model and its reference both; that which samples
    # reads each token once.
    return {
        "sequences": data.sequences,
        "extra_passes": work.passes * (2 if work.reference else 1) + live + (work.samples > 0),
        "frozen_copy": live and tuner == "full",
        "scores": work.scores,
        "samples": work.samples,
    }


def total_steps(request: TrainRequest, items: int, global_batch: int) -> int:
    """Return the optimizer steps of the whole run over `items` rows or blocks an epoch."""
    steps = math.ceil(request.num_train_epochs * math.ceil(items / global_batch))
    return request.max_steps if request.max_steps is not None else max(1, steps)


def largest_step(
    data: DataFacts,
    micro_batch: int,
    global_batch: int,
    seed: int,
    steps: int,
    layout: Layout = "lines",
    shares: bool = False,
) -> StepShape:
    """Return the largest micro-batch that the run will meet: the order is known beforehand.

    With `shares`, what rows begin with alike is in it once, as far as `data` knows them.

    Of blocks, which differ little, of streamed rows, of which only a sample is known, and of units
    that are drawn in secret, it is the largest that could be met.
    """
    if data.sampled_from is not None:
        return _largest_of_streamed(data, min(micro_batch, data.sampled_from), layout)
    if data.packed_rows is not None:
        return _largest_of_blocks(data, min(micro_batch, len(data.lengths)), layout)
    if data.units:
        return _largest_drawn(data, min(micro_batch, len(data.lengths)))
    sizes = RowSizes(data.lengths)
    read = _sequences(data)
    arrange = _kindred(data, read) if shares else None
    per_epoch = -(-len(data.lengths) // global_batch)
    tokens = labels = mask = height = width = pixels = 0
    masked = False
    shapes: set[tuple[int, int]] = set()
    # Past a few epochs the largest meeting of long rows has been seen; it only creeps up.
    rows_looked_at = SHARING_ROWS_LOOKED_AT if shares else ROWS_LOOKED_AT
    for step in range(min(steps, 3 * per_epoch, max(1, rows_looked_at // global_batch))):
        for each in step_micro_batches(
            sizes, step, micro_batch, global_batch, seed, layout, arrange
        ):
            rows = [row for item in each for row in item]
            made = _micro_shape(data, read, rows, layout, shares)
            shapes.add((made.lines, made.width))
            if (made.lines * made.width, made.width) > (tokens, width):
                tokens, height, width = made.lines * made.width, made.lines, made.width
            mask = max(mask, made.lines * made.width**2 if made.packed else 0)
            masked = masked or made.masked
            labels = max(labels, sum(data.label_tokens[row] for row in rows))
            if data.image_bytes:
                pixels = max(pixels, sum(data.image_bytes[row] for row in rows))
    return StepShape(
        tokens, labels, mask, height, width, masked=masked, image_bytes=pixels,
        alike=len(shapes) == 1,
    )  # fmt: skip


@dataclass(frozen=True)
class _Sequences:
    """What the model reads of all rows: each sequence's tokens, and the numbers of each row's."""

    lengths: Sequence[int]
    of: Sequence[range]


def _sequences(data: DataFacts) -> _Sequences:
    if not data.parts:
        return _Sequences(data.lengths, [range(row, row + 1) for row in range(len(data.lengths))])
    ends = list(accumulate(map(len, data.parts)))
    ranges = [range(end - len(parts), end) for end, parts in zip(ends, data.parts, strict=True)]
    return _Sequences([each for parts in data.parts for each in parts], ranges)


def _kindred(data: DataFacts, read: _Sequences) -> Arrange | None:
    """Return how rows that share their beginnings meet, as the training loop has it."""
    known = data.beginnings
    if known is None:
        return None

    def arranged(chosen: Sequence[tuple[int, ...]], most: int) -> list[list[int]]:
        rows = [[number for row in item for number in read.of[row]] for item in chosen]
        return kindred_shares(rows, read.lengths, known, most)

    return arranged


def _micro_shape(
    data: DataFacts, read: _Sequences, rows: Sequence[int], layout: Layout, shares: bool
) -> BatchShape:
    numbers = [number for row in rows for number in read.of[row]]
    if shares and data.beginnings is not None:
        found = shared_lines(numbers, read.lengths, data.beginnings, layout)
        if any(any(each.shared) for each in found):
            return shared_shape(found, read.lengths)
    lengths = [read.lengths[number] for number in numbers]
    return batch_shape([[lengths[i] for i in line] for line in lines_of(lengths, layout)], layout)


def spared_share(
    data: DataFacts, micro_batch: int, global_batch: int, seed: int, layout: Layout = "lines"
) -> float:
    """Return the share of a step's tokens that isn't computed, because rows begin alike.

    Args: as of `largest_step`; the first epoch's first micro-batches are looked at.
    """
    known = data.beginnings
    if known is None or not known.depths or data.packed_rows is not None:
        return 0.0
    sizes, read = RowSizes(data.lengths), _sequences(data)
    whole = computed = 0
    arrange = _kindred(data, read)
    steps = -(-min(len(data.lengths), ROWS_AVERAGED) // global_batch)
    for step in range(steps):
        for each in step_micro_batches(
            sizes, step, micro_batch, global_batch, seed, layout, arrange
        ):
            numbers = [number for item in each for row in item for number in read.of[row]]
            lines = shared_lines(numbers, read.lengths, known, layout)
            whole += sum(read.lengths[number] for number in numbers)
            computed += sum(line_tokens(line, read.lengths) for line in lines)
    return 1 - computed / whole


def _largest_of_streamed(data: DataFacts, count: int, layout: Layout) -> StepShape:
    """Return the shape of rows that are all as long as one may be.

    As much of them carries loss as of that row of the sample of which the most does.
    """
    lengths = [data.max_length] * (count * data.sequences)
    lines = [[lengths[i] for i in line] for line in lines_of(lengths, layout)]
    made = batch_shape(lines, layout)
    pairs = zip(data.label_tokens, data.lengths, strict=True)
    share = max(labels / tokens for labels, tokens in pairs)
    return StepShape(
        tokens=made.lines * made.width,
        label_tokens=math.ceil(share * sum(lengths)),
        mask_values=made.lines * made.width**2 if made.packed else 0,
        rows=made.lines,
        width=made.width,
        masked=layout == "padded" and made.lines > 1,
    )


def _largest_drawn(data: DataFacts, count: int) -> StepShape:
    """Return the shape of the longest rows together: which ones are drawn, nobody knows."""
    longest = sorted(data.lengths)[-count:]
    made = batch_shape([[each] for each in longest], "padded")
    labels = sum(sorted(data.label_tokens)[-count:])
    tokens = made.lines * made.width
    return StepShape(tokens, labels, 0, made.lines, made.width, masked=made.masked)


def _largest_of_blocks(data: DataFacts, count: int, layout: Layout) -> StepShape:
    longest = sorted(data.lengths)[-count:]
    lines = [longest] if layout == "line" else [[each] for each in longest]
    made = batch_shape([[*line, 0] for line in lines], layout)  # each holds several rows
    return StepShape(
        tokens=made.lines * made.width,
        label_tokens=sum(sorted(data.label_tokens)[-count:]),
        mask_values=made.lines * made.width**2,
        rows=made.lines,
        width=made.width,
        masked=False,
    )


def step_shapes(
    data: DataFacts, request: TrainRequest, layout: Layout
) -> Callable[[int, int, bool], StepShape]:
    """Return `largest_step` as a function of its batches and `shares` that remembers."""

    @lru_cache(maxsize=64)
    def shape(micro_batch: int, global_batch: int, shares: bool) -> StepShape:
        steps = total_steps(request, epoch_items(data), global_batch)
        return largest_step(data, micro_batch, global_batch, request.seed, steps, layout, shares)

    return shape


def spared_shares(
    data: DataFacts, request: TrainRequest, layout: Layout
) -> Callable[[int, int], float]:
    """Return `spared_share` as a function of micro-batch and global batch that remembers."""

    @lru_cache(maxsize=64)
    def spared(micro_batch: int, global_batch: int) -> float:
        return spared_share(data, micro_batch, global_batch, request.seed, layout)

    return spared
