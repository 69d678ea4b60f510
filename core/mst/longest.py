"""How long rows may be, in each way to train: what `mst plan --max-length max` finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from mst.candidates import GLOBAL_BATCH_ROWS, candidates, ways, within
from mst.configuration import Configuration
from mst.memory_bounds import usable_words
from mst.offloading_choice import offloading_obstacle
from mst.plan import Alternative
from mst.ranking import Candidate, alternative, order
from mst.reasons import budget_warning
from mst.shortfall import LENGTH_STEP, last_holding, nothing_fits
from mst.space import Space
from mst.workload import DataFacts, layout_in, step_shapes

# Where a model does not say how long its context is.
MOST_LENGTH = 2**20


@dataclass(frozen=True)
class LengthLimit:
    """The longest rows of one way to train, with or without checkpointing and offloading.

    Attributes:
        max_length: tokens, a multiple of `LENGTH_STEP`; 0 when not even that fits.
        at: the configuration with rows of that length, or of the shortest that was looked at.
    """

    max_length: int
    at: Alternative


@dataclass(frozen=True)
class LongestRows:
    """What was found, and what it rests on.

    Attributes:
        limits: those with the longest rows first; of the same length, the fastest.
        context: the model's, which bounds them all; None when it is not known.
        micro_batch: rows of that length in a micro-batch.
        label_share: of a row's tokens, how many are taken to carry loss.
        bound: what memory may be used, in words; "" when it is not known.
    """

    limits: tuple[LengthLimit, ...]
    context: int | None
    micro_batch: int
    label_share: float
    bound: str


def longest_rows(space: Space) -> LongestRows:
    """Return the longest rows of every way to train that the request leaves open.

    The forecast is that of a plan whose rows all have that length, and as many labels as that row
    of the data of which the most carries loss.

    Args:
        space: what can be chosen from; its rows give the labels' share, not the length.

    Raises:
        NothingFits: not even the shortest rows fit.
    """
    context = space.model.max_position_embeddings
    most = context or MOST_LENGTH
    lengths = range(LENGTH_STEP, most + 1, LENGTH_STEP) or range(most, most + 1)

    @cache
    def at(length: int) -> Space:
        return _with_rows_of(space, length)

    found = [
        limit
        for way in ways(space)
        for switches in _switches(space)
        for limit in [_limit(at, way, switches, lengths)]
    ]
    if not any(length for length, _ in found):
        shortest = at(lengths[0])
        raise nothing_fits(shortest, candidates(shortest))
    found.sort(key=lambda each: (-each[0], *order(each[1])))
    return LongestRows(
        limits=tuple(LengthLimit(length, alternative(one, space.model)) for length, one in found),
        context=context,
        micro_batch=_micro_batch(space),
        label_share=_label_share(space.data),
        bound=budget_warning(space) or usable_words(space, 1),
    )


def _switches(space: Space) -> list[dict[str, Any]]:
    """Return what the request may say of checkpointing, and of offloading what it keeps."""
    request = space.request
    asked, offloading = request.gradient_checkpointing, request.activation_offloading
    recomputed = "on" if asked == "auto" else asked
    ways = [("off", "off")] if asked == "auto" and offloading != "on" else []
    if offloading != "on":
        ways.append((recomputed, "off"))
    if not offloading_obstacle(request, space.capabilities):
        ways.append((recomputed, "on"))
    return [
        {"gradient_checkpointing": again, "activation_offloading": kept} for again, kept in ways
    ]


def _limit(
    at: Callable[[int], Space], way: Configuration, switches: Mapping[str, Any], lengths: range
) -> tuple[int, Candidate]:
    """Return the longest rows that fit, or 0, and the candidate with them or the shortest."""

    def made(length: int) -> Candidate:
        space = at(length)
        asked = replace(space.request, **switches)
        return within(replace(space, request=asked), way)[0]

    longest = last_holding(lengths, lambda length: not made(length).why_not)
    return longest or 0, made(longest or lengths[0])


def _micro_batch(space: Space) -> int:
    return space.request.per_device_train_batch_size or 1


def _label_share(data: DataFacts) -> float:
    pairs = zip(data.label_tokens, data.lengths, strict=True)
    return max(labels / tokens for labels, tokens in pairs)


def _with_rows_of(space: Space, length: int) -> Space:
    """Return the space with rows that are all of `length` tokens, and the micro-batch fixed."""
    data, size = space.data, _micro_batch(space)
    world = (space.request.nproc_per_node or len(space.devices)) * space.request.nnodes
    rows = size * max(GLOBAL_BATCH_ROWS, world)
    whole = length * data.sequences
    alike = replace(
        data,
        lengths=(whole,) * rows,
        label_tokens=(math.ceil(whole * _label_share(data)),) * rows,
        parts=((length,) * data.sequences,) * rows if data.parts else (),
        max_length=length,
        longest=length,
        packed_rows=None if data.packed_rows is None else rows,
        sampled_from=None,
        units=rows if data.units else 0,
        beginnings=None,
        image_bytes=(max(data.image_bytes),) * rows if data.image_bytes else (),
    )
    request = replace(space.request, per_device_train_batch_size=size)
    shape = step_shapes(alike, request, layout_in(alike, space.attention, request.padding_free))
    return replace(space, data=alike, request=request, shape=shape, shares=False)
