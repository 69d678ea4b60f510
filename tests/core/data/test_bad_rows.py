"""Rows that stand in real files by mistake, seen from `mst plan` and from the reader."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mst import cli
from mst.data.compressed import MAX_RATIO_FROM_BYTES
from mst.data.formats import Reading, read
from mst.data.refusals import RowError
from mst.data.shapes import values
from mst.job import prepare_job
from mst.request import TrainRequest

Refuses = Callable[..., str]
Jsonl = Callable[..., str]

SECRET = "Frau Müller 王小明 +49-151"
SKIP = Reading(on_bad_row="skip")


def pair(question: str, answer: str) -> dict[str, Any]:
    return {"query": question, "response": answer}


LABELED = [pair(f"q{number}", answer) for number in range(20) for answer in ("yes", "no")]


def call(identity: str) -> dict[str, Any]:
    function = {"name": "f", "arguments": {}}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": identity, "type": "function", "function": function}],
    }


def test_calls_that_answer_each_other_in_a_circle_are_refused(
    jsonl: Jsonl, refuses: Refuses
) -> None:
    result = {"role": "tool", "content": SECRET}
    turns = [
        {"role": "user", "content": SECRET},
        call("a"),
        result | {"tool_call_id": "b"},
        call("b"),
        result | {"tool_call_id": "a"},
        {"role": "assistant", "content": "done"},
    ]
    path = jsonl({"messages": turns})

    refuses(lambda: read([path]), "row 1, message 3", "'tool_call_id'", "behind its call")


def test_a_table_row_that_is_bad_is_skipped_alone(tmp_path: Path) -> None:
    lines = [b"query,response", b"q,a", b"q\xff,a", b"q\0,a", b'"x\ny",b', b"only", b"q,c"]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\n".join(lines) + b"\n")
    data = read([str(path)], SKIP)

    assert [(row.number, row.messages[1].content) for row in data.rows] == [
        (1, "a"),
        (4, "b"),
        (6, "c"),
    ]
    assert [each.split(": ")[0] for each in data.files[0].skipped] == [
        "it must be UTF-8, but is not",
        "it holds NUL bytes, so it is damaged, or UTF-16",
        "2 cells are expected as in the header, found 1",
    ]


def test_a_bad_header_is_never_skipped(tmp_path: Path, refuses: Refuses) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"query,\xffresponse\nq,a\n")

    refuses(lambda: read([str(path)], SKIP), "a.csv", "must be UTF-8", "line 1, byte 7")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_a_field_that_no_model_could_read_is_refused(
    tmp_path: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(values, "_MAX_CHARACTERS", 100)
    long = SECRET * 10
    written = {"a.json": json.dumps([{"text": long}]), "a.jsonl": json.dumps({"text": long})}
    path = tmp_path / name
    path.write_text(written.get(name, f"{'text' * (name == 'a.csv')}\n{long}\n"), encoding="utf-8")

    refuses(lambda: read([str(path)]), ", row ", "'text'", "characters that fit", "Split it")


def test_a_bomb_of_default_size_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range((MAX_RATIO_FROM_BYTES >> 20) + 1):
            file.write(b"0" * (1 << 20))
        file.write(b'"}')

    refuses(lambda: read([str(path)], SKIP), "a.jsonl.gz", "decompression bomb", "by hand")


def test_bad_rows_are_left_out_of_the_plan_and_kept_in_the_manifest(
    jsonl: Jsonl,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Lines are not to be broken within the names of files, wherever these lie.
    monkeypatch.setenv("COLUMNS", "500")
    bad = [pair(SECRET, ""), pair(SECRET, " "), f"{{{SECRET}"]
    data = jsonl(*LABELED, *bad, name="train.jsonl")
    val = jsonl(pair("q", "yes"), pair("q", SECRET), name="val.jsonl")
    args = ["--dataset", data, "--val-dataset", val, "--model", str(tiny_model), "--device", "cpu"]
    refused = cli.main(["plan", *args])
    capsys.readouterr()
    skipped = cli.main(["plan", *args, "--on-bad-row", "skip"])
    out = " ".join(capsys.readouterr().out.split())

    assert (refused, skipped) == (1, 0)
    assert "train.jsonl: 40 rows" in out
    assert "it is empty: there is nothing to learn: 2 (row 41, 42)" in out
    assert "val.jsonl: 1 rows" in out
    assert "none of the 2 answers of --dataset: 1 (row 2)" in out
    assert SECRET not in out

    request = TrainRequest(
        model=str(tiny_model), dataset=(data,), val_dataset=(val,), device="cpu", on_bad_row="skip"
    )
    manifest = prepare_job(request, {}).manifest

    assert (manifest.data[0].rows, len(manifest.data[0].skipped)) == (40, 2)
    assert (manifest.val_data[0].rows, len(manifest.val_data[0].skipped)) == (1, 1)


def test_a_label_outside_the_set_is_an_error_unless_accuracy_is_off(
    jsonl: Jsonl, tiny_model: Path, refuses: Refuses
) -> None:
    request = TrainRequest(
        model=str(tiny_model),
        dataset=(jsonl(*LABELED, name="train.jsonl"),),
        val_dataset=(jsonl(pair("q", "yes"), pair("q", SECRET), name="val.jsonl"),),
        device="cpu",
    )

    refuses(lambda: prepare_job(request, {}), "val.jsonl, row 2, message 2", "--label-accuracy off")
    off = prepare_job(replace(request, label_accuracy="off"), {})

    assert off.manifest.val_data[0].rows == 2


def test_held_out_data_with_no_known_answer_is_refused(
    jsonl: Jsonl, tiny_model: Path, refuses: Refuses
) -> None:
    request = TrainRequest(
        model=str(tiny_model),
        dataset=(jsonl(*LABELED, name="train.jsonl"),),
        val_dataset=(jsonl(pair("q", SECRET), name="val.jsonl"),),
        on_bad_row="skip",
        device="cpu",
    )

    refuses(lambda: prepare_job(request, {}), "none of the answers of --val-dataset")


def test_an_error_of_a_row_says_its_number_once(jsonl: Jsonl) -> None:
    with pytest.raises(RowError) as caught:
        read([jsonl(pair("q", "a"), pair(SECRET, ""))])

    assert str(caught.value).count("row 2") == 1
    assert caught.value.place.row == 2


def test_a_run_does_not_go_on_with_other_data(
    jsonl: Jsonl, tiny_model: Path, refuses: Refuses
) -> None:
    from mst.training.objectives import find_objective
    from mst.training.worker import _data

    path = jsonl(*LABELED)
    job = prepare_job(TrainRequest(model=str(tiny_model), dataset=(path,), device="cpu"), {})
    objective = find_objective(job.request)

    assert _data(job.request, job.manifest, objective).files == job.manifest.data
    jsonl(*LABELED, pair(SECRET, "yes"))
    refuses(
        lambda: _data(job.request, job.manifest, objective), path, "Put it back", "--output-dir"
    )


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_that_is_a_bomb_is_refused(tmp_path: Path, refuses: Refuses, suffix: str) -> None:
    import pyarrow as arrow
    from pyarrow import feather, parquet

    text = "0" * (1 << 20)
    table = arrow.table({"text": [text + str(number) for number in range(80)]})
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    else:
        feather.write_feather(table, path, compression="zstd")
    assert path.stat().st_size < 100_000

    refuses(lambda: read([str(path)], SKIP), path.name, "decompression bomb", ".jsonl")


@pytest.mark.parametrize("store_schema", [True, False])
def test_a_value_that_a_dictionary_repeats_for_ever_is_refused(
    tmp_path: Path, refuses: Refuses, store_schema: bool
) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    # Its pages unpack to little; the rows made of them don't.
    places = arrow.array([0] * 5000, arrow.int32())
    column = arrow.DictionaryArray.from_arrays(places, ["0" * (1 << 20)])
    path = tmp_path / "a.parquet"
    parquet.write_table(
        arrow.table({"text": column}), path, compression="zstd", store_schema=store_schema
    )

    refuses(lambda: read([str(path)], SKIP), "a.parquet", "decompression bomb")
