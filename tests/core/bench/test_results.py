"""Files of results: nothing half, nothing edited, nothing of another version, nothing twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.measured_cells import A100, cell, failed, forecast, measured, results

from mst import cli, serial
from mst.bench import store
from mst.bench.matrix import Matrix
from mst.bench.result_file import (
    ResultsError,
    content_hash,
    measured_from,
    merge,
    read_results,
    write_results,
)
from mst.bench.results import ABSENT, MEMORY, TIMEOUT, Results
from mst.errors import EXIT_USAGE, RunError, UsageError

ROOT = Path(__file__).resolve().parents[3]
OTHER = cell(length=1024)


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    found = results(measured(), failed(MEMORY, "16 GiB were needed"), forecast())
    write_results(tmp_path / "results.json", found)

    assert read_results(tmp_path / "results.json") == found
    assert read_results(tmp_path) == found


def test_the_layout_of_a_file_does_not_matter_but_its_contents_do(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_results(path, results(measured()))
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document))
    again = read_results(path)
    document["results"]["cells"][0]["repeats"][0]["tokens"] += 1
    path.write_text(json.dumps(document))

    assert again == results(measured())
    with pytest.raises(ResultsError, match=r"a\.json is not as `mst bench` wrote it"):
        read_results(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": "mst-bench/7"}', "of schema 'mst-bench/7'; this mst reads 'mst-bench/1' and"),
        ('{"a": 1}', "names no schema"),
        ("[]", "names no schema"),
        ("{", "is not JSON"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ResultsError) as caught:
        read_results(path)

    assert words in str(caught.value)
    assert "odd.json" in str(caught.value)


def test_a_file_of_the_first_schema_is_read_and_its_cells_keep_their_ids(tmp_path: Path) -> None:
    old = ROOT / "tests/data/bench/schema-1.json"
    found = read_results(old)
    lines = json.loads(old.read_text())["results"]["cells"]
    text = "".join(
        json.dumps({"sha256": content_hash(each), "measured": each}) + "\n" for each in lines[:1]
    )
    (tmp_path / store.MEASURED).write_text(text)
    long = cell(
        length=1024, device="cuda", exports=("gptq",), serving=(1, 8), seed=7, packing=False,
        dataset=("rows.jsonl",),
    )  # fmt: skip

    assert found.cells[0] == measured()
    assert found.cells[1].cell == long
    assert [each.id for each in found.cells] == [each.cell.id for each in found.cells]
    assert store.read(tmp_path) == {cell().id: measured()}


def test_a_cell_is_measured_once_and_the_newest_line_counts(tmp_path: Path) -> None:
    cells = [cell(), OTHER]
    with store.claim(tmp_path / "bench", Matrix()):
        store.append(tmp_path / "bench", failed(TIMEOUT, "hung"))
        known = store.read(tmp_path / "bench")
        again = store.left(cells, known, retry=True)
        rest = store.left(cells, known, retry=False)
        store.append(tmp_path / "bench", measured())
        store.append(tmp_path / "bench", failed(ABSENT, "no such device", cell=OTHER))
        made = store.finish(tmp_path / "bench", Matrix(), cells, [forecast()], [])

    assert (again, rest) == (cells, [OTHER])
    # A device may be plugged in by now.
    assert store.left(cells, store.read(tmp_path / "bench"), retry=False) == [OTHER]
    assert [each.status for each in made.cells] == ["done", "absent", "forecast"]
    assert read_results(tmp_path / "bench") == made


def test_a_line_that_a_crash_cut_off_is_measured_again(tmp_path: Path) -> None:
    store.append(tmp_path, measured())
    whole = (tmp_path / store.MEASURED).read_bytes()
    (tmp_path / store.MEASURED).write_bytes(whole + whole[: len(whole) // 2])
    store.append(tmp_path, measured(cell=OTHER))

    assert set(store.read(tmp_path)) == {cell().id, OTHER.id}


def test_a_name_with_a_line_separator_is_measured_once(tmp_path: Path) -> None:
    odd = cell(model="/models/a\u2028b\x85c")
    store.append(tmp_path, measured(cell=odd))

    assert store.read(tmp_path) == {odd.id: measured(cell=odd)}


def test_a_line_that_somebody_edited_is_refused(tmp_path: Path) -> None:
    store.append(tmp_path, measured())
    text = (tmp_path / store.MEASURED).read_text().replace('"tokens": 8000', '"tokens": 90000')
    (tmp_path / store.MEASURED).write_text(text)

    with pytest.raises(ResultsError, match=r"measured\.jsonl, line 1 is not as"):
        store.read(tmp_path)


def test_a_directory_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ResultsError, match=r"it holds thesis\.tex"):
        store.claim(tmp_path, Matrix())

    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_benches_do_not_share_a_directory(tmp_path: Path) -> None:
    with store.claim(tmp_path, Matrix()), pytest.raises(RunError, match="in use by another mst"):
        store.claim(tmp_path, Matrix())


def test_sites_that_talk_to_nobody_are_merged_by_their_files() -> None:
    here = results(measured(), failed(ABSENT, "no A100", cell=OTHER), name="a")
    there = results(measured(machine=A100), measured(cell=OTHER, machine=A100), name="b")
    made = merge([("a.json", here), ("b.json", there), ("copy of a.json", here)], "now")

    assert made.name == "a + b"
    assert [(each.id, each.status) for each in made.cells] == [
        (cell().id, "done"), (cell().id, "done"), (OTHER.id, "done"),
    ]  # fmt: skip


def test_files_that_contradict_each_other_are_not_merged() -> None:
    one, other = results(measured()), results(measured(speeds=(500.0,)))
    with pytest.raises(UsageError) as caught:
        merge([("a.json", one), ("b.json", other)], "now")

    assert "a.json and b.json both have the cell" in str(caught.value)
    assert "on ward-1, with other figures" in str(caught.value)


def test_a_cell_of_another_version_is_no_cell() -> None:
    plain = serial.to_json(measured())

    with pytest.raises(ValueError, match="colour"):
        measured_from({**plain, "colour": "red"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show"], "mst bench show takes one file of results; found 0"),
        (["merge", "a.json"], "mst bench merge takes two files of results or more; found 1"),
        (["quick", "extra"], "unexpected argument 'extra'"),
        (["show", "a", "--retry"], "--retry goes with a matrix or quick"),
        (["show", "a", "--output-dir", "x"], "--output-dir goes with a matrix or quick"),
        (["m.yaml", "--device", "cpu"], "a matrix has the key devices"),
        (["quick", "--price", "a100"], "--price takes CHIP=AMOUNT"),
        (["quick", "--price", "a100=-1"], "--price a100 takes an amount from 0 on, not '-1'"),
        (["quick", "--kwh-price", "nan"], "--kwh-price takes an amount from 0 on, not 'nan'"),
        (["quick", "--allow-net", "10.0.0.0/8"], "--allow-net is for jobs on several machines"),
        (["quick", "--tolerance", "2"], "--tolerance takes a share from 0 to 1, not 2.0"),
        (["peak", "--dtype", "int8"], "--dtype int8: a peak is of"),
        (["qick"], "cannot read the matrix qick"),
        (["show", "a.json", "--htm", "x"], "unknown option --htm. Did you mean --html?"),
    ],
)
def test_a_command_that_makes_no_sense_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli.main(["bench", *arguments, "--audit-log", str(tmp_path / "audit")])

    assert (code, words in capsys.readouterr().err) == (EXIT_USAGE, True)


def test_machines_of_a_list_whose_file_is_missing_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(tmp_path / "a.json", results(measured()))
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("# wards\nward-1 a.json\nward-7 b.json\n")
    log = ["--audit-log", str(tmp_path / "audit")]
    code = cli.main(["bench", "merge", "--hosts", str(hosts), *log])
    shown = capsys.readouterr().out
    hosts.write_text("ward-1\n")
    odd = cli.main(["bench", "merge", "--hosts", str(hosts), *log])

    assert (code, odd) == (0, EXIT_USAGE)
    assert f"no results of ward-7: {tmp_path}/b.json is not there" in shown
    assert "line 1: a line is NAME FILE" in capsys.readouterr().err


def test_merged_results_are_written_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    write_results(files[0], results(measured()))
    write_results(files[1], results(replace(measured(), machine=A100)))
    target = tmp_path / "all.json"
    code = cli.main(
        ["bench", "merge", *map(str, files), "--output", str(target), "--audit-log",
         str(tmp_path / "audit")]
    )  # fmt: skip

    assert code == 0
    assert len(read_results(target).cells) == 2
    assert "2 cells" in capsys.readouterr().out
    assert isinstance(read_results(target), Results)
