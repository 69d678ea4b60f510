"""Which rows begin alike, and how they lie in lines: every row is spelt, and sees itself alone."""

from __future__ import annotations

from array import array
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mst.data.encode import IGNORE, Example
from mst.data.rows import Row
from mst.training.batches import KEPT_MULTIPLE, TOKENS_MULTIPLE, Layout
from mst.training.prefixes import LEAST_SHARED, beginnings, common_length, shared_tokens
from mst.training.scoring import lay_out
from mst.training.shared_lines import (
    Line,
    collate_shared,
    kindred_shares,
    line_tokens,
    lines_cost,
    paths,
    shared_lines,
)

PAD = 99
LAYOUTS: tuple[Layout, ...] = ("lines", "alike", "single")


def row(ids: list[int], labels: list[int] | None = None) -> Example:
    """Return a row whose tokens but the first have labels, or those that are given."""
    found = [IGNORE, *ids[1:]] if labels is None else labels
    return Example(array("i", ids), array("i", found), Row((), "memory", 1))


# Few ids, so that rows begin alike, and one is another's beginning.
stems = st.lists(st.integers(0, 1), min_size=1, max_size=60)


@st.composite
def many_rows(draw: st.DrawFn) -> list[Example]:
    """Return rows that branch off one another, and some that don't, with labels here and there."""
    found: list[list[int]] = []
    for _ in range(draw(st.integers(1, 9))):
        ids = draw(stems)
        branch: bool = draw(st.booleans())
        if found and branch:
            stem = draw(st.sampled_from(found))
            ids = stem[: draw(st.integers(0, len(stem)))] + ids
        found.append(ids)
    rows = []
    for ids in found:
        marked = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        labels = [each if mark else IGNORE for each, mark in zip(ids, marked, strict=True)]
        rows.append(row(ids, [IGNORE, *labels[1:]]))
    return rows


@given(st.lists(stems, min_size=2, max_size=9))
def test_what_two_sequences_share_is_their_common_beginning(found: list[list[int]]) -> None:
    sequences = [array("i", each) for each in found]
    known = beginnings(sequences)
    for a, one in enumerate(sequences):
        for b, other in enumerate(sequences):
            alike = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
            whole = sum(1 for _ in alike)

            assert common_length(one, other) == whole
            if a != b:
                assert shared_tokens(known, a, b) == (whole if whole >= LEAST_SHARED else 0)


@settings(deadline=None)
@given(many_rows(), st.sampled_from(LAYOUTS))
def test_every_row_lies_in_one_line_and_its_path_spells_it(
    rows: list[Example], layout: Layout
) -> None:
    lengths = [len(each.input_ids) for each in rows]
    lines = shared_lines(range(len(rows)), lengths, beginnings([r.input_ids for r in rows]), layout)

    assert sorted(number for line in lines for number in line.rows) == list(range(len(rows)))
    if layout == "alike":
        assert len(lines) == 1 if len(rows) <= 2 else len(lines) >= 2
    if layout == "single":
        assert len(lines) == 1
    batch = collate_shared(rows, lines, PAD, layout)
    lines_ids, lines_positions = batch.input_ids.tolist(), batch.position_ids.tolist()
    for line, ids, positions in zip(lines, lines_ids, lines_positions, strict=True):
        for number, path in zip(line.rows, paths(line, lengths), strict=True):
            places = [place for part in path for place in part]

            assert [ids[place] for place in places] == list(rows[number].input_ids)
            assert [positions[place] for place in places] == list(range(lengths[number]))
        assert ids[line_tokens(line, lengths) :] == [PAD] * (len(ids) - line_tokens(line, lengths))


@settings(deadline=None)
@given(many_rows(), st.sampled_from(LAYOUTS))
def test_a_token_sees_its_rows_earlier_tokens_and_nothing_else(
    rows: list[Example], layout: Layout
) -> None:
    lengths = [len(each.input_ids) for each in rows]
    lines = shared_lines(range(len(rows)), lengths, beginnings([r.input_ids for r in rows]), layout)
    batch = collate_shared(rows, lines, PAD)
    assert batch.attention_mask is not None
    for line, mask in zip(lines, batch.attention_mask[:, 0], strict=True):
        seen: dict[int, set[int]] = {}
        for path in paths(line, lengths):
            places = [place for part in path for place in part]
            for end, place in enumerate(places):
                # Rows that share a place agree on what it sees.
                assert seen.setdefault(place, set(places[: end + 1])) == set(places[: end + 1])
        for place, sees in enumerate(mask.tolist()):
            expected = seen.get(place, {place})  # what is padded sees itself alone

            assert {other for other, visible in enumerate(sees) if visible} == expected


@settings(deadline=None)
@given(many_rows(), st.sampled_from(LAYOUTS))
def test_every_label_of_every_row_is_predicted_from_its_rows_own_path(
    rows: list[Example], layout: Layout
) -> None:
    lengths = [len(each.input_ids) for each in rows]
    lines = shared_lines(range(len(rows)), lengths, beginnings([r.input_ids for r in rows]), layout)
    batch = collate_shared(rows, lines, PAD)
    expected = [
        (number, places[end - 1], rows[row].labels[end])
        for number, line in enumerate(lines)
        for row, path in zip(line.rows, paths(line, lengths), strict=True)
        for places in [[place for part in path for place in part]]
        for end in range(1, lengths[row])
        if rows[row].labels[end] != IGNORE
    ]
    kept = len(batch.keep)
    assert batch.labels is not None
    found = [
        (place // kept, int(batch.keep[place % kept]), label)
        for place, label in zip(batch.labelled.tolist(), batch.labels.tolist(), strict=True)
    ]

    assert found == expected
    assert batch.label_tokens == len(expected)
    assert batch.tokens == sum(lengths)
    assert batch.input_ids.shape[1] % TOKENS_MULTIPLE == 0
    assert kept % KEPT_MULTIPLE == 0


@settings(deadline=None)
@given(many_rows(), st.sampled_from(LAYOUTS), st.booleans())
def test_labels_go_back_to_their_rows(rows: list[Example], layout: Layout, shares: bool) -> None:
    laid = lay_out(rows, PAD, layout, shares=shares)
    labels = laid.batch.labels
    if labels is None:
        labels = laid.batch.targets.flatten()[laid.batch.labelled]
    spread = labels.new_full((laid.weights.numel(),), IGNORE).scatter(0, laid.places, labels)
    for each, found in zip(rows, spread.view(laid.weights.shape).tolist(), strict=True):
        own = [label for label in each.labels if label != IGNORE]

        assert found == own + [IGNORE] * (len(found) - len(own))


def shared(rows: list[list[int]], layout: Layout = "lines") -> list[Line]:
    sequences = [array("i", each) for each in rows]
    lengths = list(map(len, sequences))
    return shared_lines(range(len(rows)), lengths, beginnings(sequences), layout)


def test_beginnings_nest() -> None:
    system, shots = list(range(100, 140)), list(range(200, 230))
    rows = [
        [*system, *shots, 1, 2],
        [*system, 3, 4],
        [*system, *shots, 5, 6, 7],
        [*system, *shots, 1, 2, 8],
    ]
    (line,) = shared(rows)

    assert sorted(line.shared) == [0, 40, 70, 72]
    assert line_tokens(line, list(map(len, rows))) == 40 + 30 + 2 + 2 + 3 + 1


def test_short_beginnings_are_left_alone() -> None:
    start = list(range(100, 100 + LEAST_SHARED - 1))
    lines = shared([[*start, 1, 2, 3], [*start, 4, 5, 6]])

    assert not any(any(line.shared) for line in lines)


def test_rows_with_one_beginning_lie_in_one_line_of_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = list(range(100, 400)), list(range(500, 800))
    rows = [
        [*start, *range(number, number + 9)]
        for number in range(0, 80, 10)
        for start in (first, second)
    ]
    lines = shared(rows, "alike")

    assert {frozenset(rows[number][0] for number in line.rows) for line in lines} == {
        frozenset({100}),
        frozenset({500}),
    }


def test_alike_lines_are_two_of_even_width_where_one_would_do() -> None:
    start = list(range(100, 250))
    rows = [[*start, *range(number, number + 9)] for number in range(0, 80, 10)]
    lines = shared(rows, "alike")

    assert [line_tokens(line, list(map(len, rows))) for line in lines] == [186, 186]
    # Two sequences share one line, so that the compiled layers always get one.
    assert len(shared(rows[:2], "alike")) == 1
    assert len(shared([[1, 2], [3, 4]], "alike")) == 1


def shares_of(rows: list[list[list[int]]], most: int) -> list[list[int]]:
    """Return shares of rows, each of which is one sequence or several."""
    sequences = [array("i", each) for parts in rows for each in parts]
    counter = iter(range(len(sequences)))
    numbers = [[next(counter) for _ in parts] for parts in rows]
    return kindred_shares(numbers, list(map(len, sequences)), beginnings(sequences), most)


@given(many_rows(), st.integers(1, 5))
def test_every_row_is_in_one_share(rows: list[Example], most: int) -> None:
    found = shares_of([[list(each.input_ids)] for each in rows], most)

    assert sorted(place for share in found for place in share) == list(range(len(rows)))
    assert max(map(len, found)) <= most
    assert len(found) == -(-len(rows) // most)


def test_rows_with_one_beginning_meet() -> None:
    starts = [list(range(first, first + 50)) for first in (100, 200, 300)]
    rows = [[[*starts[number % 3], *range(number, number + 5)]] for number in range(12)]
    pairs = [[[*ids, 1, 2], [*ids, 3]] for [ids] in rows]

    assert shares_of(rows, 4) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert shares_of(pairs, 4) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_they_do_not_meet_where_a_share_would_outgrow_the_even_ones() -> None:
    start = list(range(100, 110))
    long = [[[*start, *range(number * 1000, number * 1000 + 90)]] for number in range(1, 5)]
    short = [[[*range(number * 1000, number * 1000 + 10)]] for number in range(5, 9)]

    # Together the long ones would have 370 tokens left.
    assert [len({0, 1, 2, 3} & set(share)) for share in shares_of(long + short, 4)] == [2, 2]


def test_rows_that_are_the_same_are_computed_once() -> None:
    ids = list(range(100, 150))
    (line,) = shared([ids, ids, ids])
    batch = collate_shared([row(ids)] * 3, [line], PAD)

    assert line.shared == (0, 50, 50)
    assert line_tokens(line, [50] * 3) == 50
    assert batch.label_tokens == 3 * 49


def test_a_width_that_spares_less_than_it_costs_is_not_taken() -> None:
    # All in one line would spare a few tokens of 16,000, and attend over eight times the width.
    start = list(range(100, 100 + LEAST_SHARED))
    rows = [[*start, *range(number * 3000, number * 3000 + 1984)] for number in range(1, 9)]
    lines = shared(rows)

    assert len(lines) == 8
    assert lines_cost(lines, list(map(len, rows))) == 8 * 2048 * 2
