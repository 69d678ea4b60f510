"""To whom a row belongs, and that a unit is held out whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mst.data.formats import Reading, read
from mst.data.prepare import parted, reading_of
from mst.errors import DataError
from mst.privacy.units import grouped
from mst.request import TrainRequest

SECRET = "patient 4711 has gout"


def write(path: Path, units: list[object]) -> Path:
    rows = [
        {"query": f"{SECRET} {n}", "response": "yes", "patient": each}
        for n, each in enumerate(units)
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def test_rows_of_several_files_are_one_unit_by_the_value_of_the_column(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", ["a", 7, "a"])
    two = tmp_path / "two.csv"
    two.write_text("query,response,patient\nq,yes,7\nq,yes, a \nq,yes,b\n")
    found = read((str(one), str(two)), Reading(unit="patient"))

    assert grouped(found.rows) == [[0, 2, 4], [1, 3], [5]]


def test_without_a_column_each_row_is_a_unit(tmp_path: Path) -> None:
    found = read((str(write(tmp_path / "rows.jsonl", ["a", "a", "b"])),))

    assert grouped(found.rows) == [[0], [1], [2]]


@pytest.mark.parametrize("unit", [None, "", "  ", 1.5, True, ["a"]])
def test_a_row_that_belongs_to_nobody_is_an_error_that_quotes_nothing(
    tmp_path: Path, unit: object
) -> None:
    path = write(tmp_path / "rows.jsonl", ["a", unit])
    with pytest.raises(DataError, match=r"--dp-unit patient .* no text or whole number") as error:
        read((str(path),), Reading(unit="patient"))

    assert SECRET not in str(error.value)


def test_a_unit_is_held_out_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [n % 10 for n in range(50)])
    request = TrainRequest(
        dataset=(str(path),), val_size=0.3, dp_epsilon=3.0, dp_unit="patient", label_accuracy="off"
    )
    reading = reading_of(request)
    train, held_out = parted(request, read(request.dataset, reading), reading)
    kept, left = ({row.unit for row in rows} for rows in (train, held_out.rows))

    assert (len(train), len(held_out.rows)) == (35, 15)
    assert not kept & left
