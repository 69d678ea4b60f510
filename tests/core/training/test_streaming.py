"""Rows that are read when a step asks for them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mst.data.formats import Reading, read
from mst.data.line_index import index_lines
from mst.data.permutation import permuted
from mst.data.prepare import Prepared, data_facts, prepare
from mst.data.refusals import Refusals
from mst.data.streaming import StreamedRows, open_files
from mst.errors import DataError, UsageError
from mst.request import TrainRequest
from mst.training.checkpoint import TrainState, listed, newest_whole, restore
from mst.training.loop import run
from mst.training.order import row_sizes, step_rows
from mst.training.sealed_directory import remove
from mst.workload import largest_step

Streamed = Callable[..., Prepared]


def line(words: int, number: int) -> str:
    draw = random.Random(number)
    question = " ".join(draw.choice(("card", "loan", "cash", "pin")) for _ in range(words))
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{number}"}]
    return json.dumps({"messages": turns}) + "\n"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sixty rows, every tenth far too long, with a BOM and blank lines between them."""
    path = tmp_path / "rows.jsonl"
    text = (line(300 if i % 10 == 3 else 3 + i % 7, i) + "\n" * (i % 4 == 0) for i in range(60))
    path.write_text("".join(text), encoding="utf-8-sig")
    return path


@pytest.fixture
def streamed(tiny_model: Path, rows: Path) -> Streamed:
    """Return a function that prepares the rows with --streaming."""

    def make(*files: Path, **options: Any) -> Prepared:
        given: dict[str, Any] = {"streaming": True, "max_length": 64, "val_size": 5.0} | options
        names = [str(each) for each in files or (rows,)]
        return prepare(TrainRequest(**given), names, tiny_model, None)

    return make


@given(st.integers(1, 300), st.text(max_size=5))
def test_a_permutation_has_every_row_once(count: int, key: str) -> None:
    assert sorted(permuted(place, count, key) for place in range(count)) == list(range(count))


def test_a_permutation_is_the_same_on_every_machine_and_differs_by_key() -> None:
    expected = [3, 8, 0, 2, 1, 9, 5, 7, 4, 6]

    assert [permuted(place, 10, "mst:42:0") for place in range(10)] == expected
    assert [permuted(place, 10, "mst:42:1") for place in range(10)] != expected


def test_streamed_rows_are_those_that_are_read_whole(rows: Path) -> None:
    files, facts = open_files([str(rows)], Reading())
    whole = read([str(rows)])

    assert tuple(files.row(number) for number in range(len(files))) == whole.rows
    assert facts[0].sha256 == whole.files[0].sha256 == hashlib.sha256(rows.read_bytes()).hexdigest()


def test_an_index_takes_eight_bytes_a_row(rows: Path) -> None:
    index = index_lines(rows, Refusals())

    assert len(index.starts) == 60
    assert index.starts.itemsize == 8


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.jsonl.gz"])
def test_files_of_other_kinds_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("[]")

    with pytest.raises(DataError, match=r"Convert or unpack it to \.jsonl"):
        open_files([str(path)], Reading())


@pytest.mark.parametrize("other", ["packing", "precompute_ref_log_probs"])
def test_what_needs_all_rows_at_once_is_refused(streamed: Streamed, other: str) -> None:
    with pytest.raises(UsageError, match="--streaming and --"):
        streamed(task="dpo", **{other: True})


def test_held_out_rows_are_not_trained_on(streamed: Streamed) -> None:
    found = streamed()
    train = found.train.examples
    assert isinstance(train, StreamedRows)
    numbers = [train.row(place).number for place in range(len(train))]

    assert len(found.val_rows) == 5
    assert len(set(numbers)) == len(numbers) == 55
    assert not set(numbers) & {each.number for each in found.val_rows}


def test_the_plan_assumes_that_a_row_is_as_long_as_may_be(streamed: Streamed) -> None:
    data = data_facts(streamed())
    shape = largest_step(data, 4, 8, 42, 10, "padded")

    assert data.sampled_from == 55
    assert max(data.lengths) < 50
    assert shape.tokens == 4 * 64


def test_a_row_that_is_too_long_contributes_nothing_and_is_counted(streamed: Streamed) -> None:
    train = streamed().train.examples
    assert isinstance(train, StreamedRows)
    sizes = row_sizes(train, None)
    # Seven steps of eight are an epoch; in the second the same rows are not counted again.
    seen = [row for step in range(7) for (row,) in step_rows(sizes, step, 8, 42)]
    again = [row for step in range(7, 14) for (row,) in step_rows(sizes, step, 8, 42)]
    long = [row for row in range(55) if len(train.row(row).messages[0].content) > 900]

    assert sorted(seen) == sorted(again) == sorted(set(range(55)) - set(long))
    assert seen != again
    assert train.left_out() == {"longer than --max-length": len(long)}


def test_a_step_whose_rows_are_all_too_long_takes_the_next_one(
    streamed: Streamed, tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(line(3 if i == 7 else 300, i) for i in range(12)))
    train = streamed(path, val_size=0.0).train.examples
    sizes = row_sizes(train, None)
    steps = [step_rows(sizes, step, 1, 42) for step in range(12)]

    assert len(set(steps)) == 1
    assert train[steps[0][0][0]].row.number == 8


def test_a_bad_row_is_an_error_with_its_line(streamed: Streamed, rows: Path) -> None:
    with rows.open("a") as file:
        file.write('{"messages": 3}\n')

    with pytest.raises(DataError, match=r"rows\.jsonl, row 76"):
        streamed(val_size=0.0)


def test_a_streamed_run_resumes_to_the_same_bytes(streamed: Streamed, begin: Any) -> None:
    options = {"total_steps": 9, "save_steps": 100, "max_length": 64, "lora_dropout": 0.1}

    def session(**more: Any) -> Any:
        return begin(train=streamed().train.examples, **options, **more)

    def weights(of: Any) -> list[bytes]:
        return [p.detach().numpy().tobytes() for p in of.model.parameters() if p.requires_grad]

    whole = session()
    run(whole, TrainState())
    for each in listed(whole.checkpoints):
        remove(each)
    stops = iter([False] * 4 + [True])
    assert run(session(stop=lambda: next(stops)), TrainState()).ending == "interrupted"
    resumed = session()
    found = newest_whole(resumed.checkpoints)
    assert found is not None
    state = restore(found, resumed.model, resumed.optimizer, resumed.names, resumed.device)
    run(resumed, state)

    assert state.step == 4
    assert weights(resumed) == weights(whole)
