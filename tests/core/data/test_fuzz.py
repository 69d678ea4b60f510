"""Rows that no one wrote on purpose: whatever they hold, they are rows or errors with a place."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mst.data.columns import find_columns
from mst.data.refusals import Place, RowError
from mst.data.rows import Row
from mst.data.shapes.row import make_row
from mst.data.shapes.turns import USUAL
from mst.data.text_files import PARSERS
from mst.errors import MstError

ROWS_AN_EXAMPLE = 50
EXAMPLES = 200
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
# One of each shape, to be damaged.
WHOLE: list[dict[str, Any]] = [
    {"messages": TURNS, "tools": [{"name": "f"}]},
    {
        "messages": [
            TURNS[0],
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": [{"type": "text", "text": "7"}], "tool_call_id": "1"},
            TURNS[1],
        ]
    },
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"conversation": [{"human": "q", "assistant": "a"}], "system": "s"},
    {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]]},
    {"query": "q", "response": "a", "thinking": "t"},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"text": "t"},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "b"}]},
    {"messages": TURNS, "rejected_response": "b"},
    {"messages": TURNS, "label": True},
]
WORDS = st.sampled_from(
    [
        "", " ", "a", "\0", "\ud800", "﻿", "\u2028", "[", "{}", "[]", "[[", '{"name": 1}', "user",
        "assistant", "tool", "gpt", "function_call", "role", "content", "from", "value", "messages",
        "text", "tool_calls", "label", "chosen", "rejected", "image_url", "https://x/y", "NaN",
    ]
)  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 10**400, 0.5, 1e308, float("nan"), float("inf")])
    | WORDS
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=4,
)
# Which whole row, which of its places, and what is put there.
DAMAGE = st.tuples(st.sampled_from(WHOLE), st.integers(0, 63), VALUES, st.sampled_from("=-+"))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a value with each of its keys."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def damaged(row: dict[str, Any], where: int, value: Any, how: str) -> dict[str, Any]:
    row = copy.deepcopy(row)
    found = list(places(row))
    container, key = found[where % len(found)]
    if how == "=":
        container[key] = value
    elif how == "-":
        del container[key]
    elif isinstance(container, list):
        container.insert(key, value)
    else:
        container[value if isinstance(value, str) else "weight"] = value
    return row


def outcomes(kind: str, data: bytes) -> list[Row | MstError]:
    """Read a file of `kind`, each record as if it were the first; anything but MstError escapes."""
    found: list[Row | MstError] = []
    try:
        for item in PARSERS[kind]("a", io.BytesIO(data)):
            found.append(item if isinstance(item, RowError) else outcome(kind, *item))
    except MstError as error:
        found.append(error)
    return found


def outcome(kind: str, number: int, fields: Mapping[str, Any]) -> Row | MstError:
    try:
        return make_row(Place("a", number), find_columns("a", kind, fields, {}), fields, USUAL)
    except MstError as error:
        return error


def placed(found: list[Row | MstError]) -> bool:
    return all(isinstance(each, Row) or str(each).startswith("a") for each in found)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(DAMAGE, min_size=ROWS_AN_EXAMPLE, max_size=ROWS_AN_EXAMPLE))
def test_ten_thousand_damaged_rows_are_rows_or_errors_with_a_place(damages: list[Any]) -> None:
    rows = [damaged(*each) for each in damages]
    lines = "".join(json.dumps(row) + "\n" for row in rows)

    found = outcomes("jsonl", lines.encode()) + outcomes("json", json.dumps(rows).encode())

    assert len(found) == 2 * len(rows)
    assert placed(found)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["jsonl", "json", "csv", "tsv", "txt"]), st.binary(max_size=60))
def test_bytes_that_are_no_data_are_rows_or_errors_with_a_place(kind: str, data: bytes) -> None:
    head = {"csv": b"query,response\n", "tsv": b"query\tresponse\n"}.get(kind, b"")

    assert placed(outcomes(kind, head + data))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), max_size=8)] * 2)))
def test_cells_are_the_text_that_was_written(cells: list[tuple[str, str]]) -> None:
    cells = [each for each in cells if "\0" not in "".join(each)]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("query", "response"), *cells])
    found = list(PARSERS["csv"]("a", io.BytesIO(text.getvalue().encode())))

    assert [tuple(item[1].values()) for item in found if not isinstance(item, RowError)] == cells
