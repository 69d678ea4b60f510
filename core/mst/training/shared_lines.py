"""Rows that begin alike lie in one line, and what they share is computed once.

A row's tokens depend on those before them alone, so rows with the same beginning have the same
hidden states in it. In a line each row follows another with which it begins alike, without that
beginning; its tokens see the shared ones under a mask, and its positions go on from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mst.data.encode import IGNORE as IGNORE_INDEX
from mst.training.batches import (
    KEPT_MULTIPLE,
    TOKENS_MULTIPLE,
    Batch,
    BatchShape,
    Layout,
    cost,
    lines_of,
    rounded,
    width_multiple,
)
from mst.training.packing import even_shares, first_fit_decreasing
from mst.training.prefixes import Beginnings, in_order

if TYPE_CHECKING:
    from mst.data.encode import Example

# Micro-batches of kindred rows are less even, and so must spare a part of the tokens.
_WORTH = 0.95


@dataclass(frozen=True)
class Line:
    """Sequences in one line.

    Attributes:
        rows: their numbers, in the order in which they lie there.
        shared: of each, how many tokens it has from the one before it; 0 for the first.
    """

    rows: tuple[int, ...]
    shared: tuple[int, ...]


def line_tokens(line: Line, lengths: Sequence[int]) -> int:
    """Return how many tokens of a line are computed, by the lengths of all sequences."""
    return sum(lengths[row] for row in line.rows) - sum(line.shared)


def shared_lines(
    numbers: Sequence[int], lengths: Sequence[int], known: Beginnings, layout: Layout
) -> list[Line]:
    """Return which sequences lie in each line of a micro-batch's tensors, the cheapest way.

    Args:
        numbers: of the micro-batch's sequences.
        lengths: of all sequences.
        known: of all sequences.
        layout: "lines"; "alike": two lines at least, except that two sequences share one; or
            "single".
    """
    ordered, joins = in_order(numbers, lengths, known)
    if layout == "single" or (layout == "alike" and len(ordered) == 2):
        return [Line(ordered, joins)]
    sizes = [lengths[number] for number in numbers]
    best = [
        Line(tuple(numbers[place] for place in line), (0,) * len(line))
        for line in lines_of(sizes, layout)
    ]
    if not any(joins):
        return best
    least = lines_cost(best, lengths)
    for width in _widths(ordered, joins, lengths):
        # Full lines would be the fewest.
        if cost(-(-(sum(sizes) - sum(joins)) // width), width) >= least:
            continue
        filled = _filled(ordered, joins, lengths, width)
        if layout == "alike" and len(filled) == 1:
            filled = _halves(ordered, joins, lengths)
        if (price := lines_cost(filled, lengths)) < least:
            best, least = filled, price
    return best


def kindred_shares(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], known: Beginnings, most_rows: int
) -> list[list[int]]:
    """Return shares of rows as `even_shares` does, or with rows that begin alike together.

    They are together where that leaves clearly less to compute, and no share is larger than the
    largest would be if nothing were shared.

    Args:
        rows: the numbers of each row's sequences.
        lengths: of all sequences.
        known: of all sequences.
        most_rows: of a share.
    """
    tokens = [sum(lengths[number] for number in row) for row in rows]
    even = even_shares(tokens, most_rows)
    if len(even) == 1:
        return even
    ordered = sorted(range(len(rows)), key=lambda row: known.places[rows[row][0]])
    cuts = [len(rows) * share // len(even) for share in range(len(even) + 1)]
    kindred = [sorted(ordered[one:other]) for one, other in pairwise(cuts)]

    def computed(share: Sequence[int]) -> int:
        numbers = (number for row in share for number in rows[row])
        line = Line(*in_order(numbers, lengths, known))
        return line_tokens(line, lengths)

    found = [computed(each) for each in kindred]
    largest = max(sum(tokens[row] for row in each) for each in even)
    less = sum(found) <= _WORTH * sum(computed(each) for each in even)
    return kindred if less and max(found) <= largest else even


def lines_cost(lines: Sequence[Line], lengths: Sequence[int]) -> float:
    """Return what a micro-batch of these lines costs, as `mst.training.batches.cost` counts."""
    widest = max(line_tokens(line, lengths) for line in lines)
    return cost(len(lines), rounded(widest, TOKENS_MULTIPLE))


def _widths(ordered: Sequence[int], joins: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Return widths of lines that are worth a try: by the longest sequence, and by all of them."""
    longest = max(lengths[number] for number in ordered)
    whole = sum(lengths[number] for number in ordered) - sum(joins)
    found = (longest, 2 * longest, 4 * longest, whole // 4, whole // 3, whole // 2, whole)
    return sorted({rounded(min(max(each, longest), whole), TOKENS_MULTIPLE) for each in found})


def _filled(
    ordered: Sequence[int], joins: Sequence[int], lengths: Sequence[int], width: int
) -> list[Line]:
    """Return lines of at most `width` tokens, sequences that begin alike side by side."""
    pieces = list(_pieces(ordered, joins, lengths, width))
    sizes = [line_tokens(each, lengths) for each in pieces]
    return [
        _joined([pieces[place] for place in sorted(each)])
        for each in first_fit_decreasing(sizes, width)
    ]


def _pieces(
    ordered: Sequence[int], joins: Sequence[int], lengths: Sequence[int], width: int
) -> Iterator[Line]:
    """Yield runs of sequences that begin alike, none of more than `width` tokens.

    To cut as late as possible leaves the fewest pieces.
    """
    rows: list[int] = []
    shared: list[int] = []
    tokens = 0
    for number, join in zip(ordered, joins, strict=True):
        own = lengths[number] - join
        if rows and (not join or tokens + own > width):
            yield Line(tuple(rows), tuple(shared))
            rows, shared, tokens = [], [], 0
        tokens += own if rows else lengths[number]
        shared.append(join if rows else 0)
        rows.append(number)
    yield Line(tuple(rows), tuple(shared))


def _joined(pieces: Sequence[Line]) -> Line:
    rows = tuple(row for each in pieces for row in each.rows)
    return Line(rows, tuple(each for piece in pieces for each in piece.shared))


def _halves(ordered: Sequence[int], joins: Sequence[int], lengths: Sequence[int]) -> list[Line]:
    """Return two lines, the longer of which is as short as can be."""
    found: list[Line] = []
    least = math.inf
    for cut in range(1, len(ordered)):
        halves = [
            Line(tuple(ordered[part]), (0, *joins[part][1:]))
            for part in (slice(cut), slice(cut, None))
        ]
        widest = max(line_tokens(each, lengths) for each in halves)
        if widest < least:
            found, least = halves, widest
    return found


def shared_shape(
    lines: Sequence[Line], lengths: Sequence[int], layout: Layout = "lines"
) -> BatchShape:
    """Return the shape of the tensors that `collate_shared` makes."""
    widest = max(line_tokens(line, lengths) for line in lines)
    width = rounded(widest, width_multiple(layout))
    return BatchShape(len(lines), width, packed=True, masked=False)


def paths(line: Line, lengths: Sequence[int]) -> list[list[range]]:
    """Return where in a line each row's tokens lie, in their order; its own are the last range."""
    found: list[list[range]] = []
    path: list[range] = []
    end = 0
    for row, shared in zip(line.rows, line.shared, strict=True):
        path = [*_cut(path, shared), range(end, end + lengths[row] - shared)]
        end = path[-1].stop
        found.append(path)
    return found


def _cut(path: Sequence[range], tokens: int) -> Iterator[range]:
    """Yield the first `tokens` places of a path."""
    for each in path:
        if tokens <= 0:
            return
        if each:
            yield each[:tokens]
        tokens -= len(each)


def collate_shared(
    sequences: Sequence[Example],
    lines: Sequence[Line],
    pad_token_id: int,
    layout: Layout = "lines",
) -> Batch:
    """Lay sequences out in lines, with what they begin with alike there only once.

    Every label of every sequence is kept: where sequences part, one position predicts the next
    token of each of them, and what they share is labelled once for each that has a label there.

    Args:
        sequences: of the micro-batch.
        lines: from `shared_lines`.
        pad_token_id: fills what is padded; each of those sees itself alone.
        layout: that the lines are of.
    """
    import torch

    lengths = [len(each.input_ids) for each in sequences]
    width = shared_shape(lines, lengths, layout).width
    ids = torch.full((len(lines), width), pad_token_id)
    positions = torch.zeros_like(ids)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(lines), 1, 1, 1)
    labelled: list[tuple[int, int, int]] = []
    for number, line in enumerate(lines):
        found = zip(line.rows, line.shared, paths(line, lengths), strict=True)
        for row, shared, path in found:
            each, own = sequences[row], slice(path[-1].start, path[-1].stop)
            ids[number, own] = torch.tensor(each.input_ids[shared:], dtype=torch.long)
            positions[number, own] = torch.arange(shared, lengths[row])
            for seen in path[:-1]:
                mask[number, 0, own, seen.start : seen.stop] = True
            mask[number, 0, own, own] = torch.ones(len(path[-1]), len(path[-1])).tril().bool()
            # Place i predicts token i + 1. A row's first token has no label.
            places = (place for part in path for place in part)
            labelled += [
                (number, place, label)
                for place, label in zip(places, each.labels[1:], strict=False)
                if label != IGNORE_INDEX
            ]
    at_line, at_place, labels = torch.tensor(labelled, dtype=torch.long).view(-1, 3).T
    keep, at_kept = at_place.unique(return_inverse=True)
    extra = rounded(len(keep), KEPT_MULTIPLE) - len(keep)
    keep = torch.cat([keep, keep.new_zeros(extra)])
    targets = torch.full((len(lines), len(keep)), IGNORE_INDEX)
    targets[at_line, at_kept] = labels
    return Batch(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        keep=keep,
        targets=targets,
        labelled=at_line * len(keep) + at_kept,
        tokens=sum(lengths),
        label_tokens=len(labels),
        labels=labels.contiguous(),
    )
