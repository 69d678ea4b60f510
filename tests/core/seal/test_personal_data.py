"""What `mst data scan` finds, what it doesn't, and what its masked copies keep."""

from __future__ import annotations

import csv
import gzip
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests import personal_values as made

import mst
from mst import cli
from mst.errors import DataError
from mst.seal.personal_data.mask import mask_file
from mst.seal.personal_data.patterns import KINDS, find
from mst.seal.personal_data.scan import scan_file
from mst.seal.personal_data.walk import count

DATA = Path(__file__).resolve().parents[2] / "data"
EACH = 250


def kinds(text: str) -> list[str]:
    return [each.kind for each in find(text)]


def test_2000_values_are_found_whole_and_as_what_they_are() -> None:
    rng = random.Random(7)
    missed: Counter[str] = Counter()
    for kind, value_of in made.VALUES.items():
        for _ in range(EACH):
            value = made.with_gaps(kind, value_of(rng), rng)
            before, after = rng.choice(made.SENTENCES).split("{}")
            found = find(before + value + after)
            place = (kind, len(before), len(before) + len(value))
            missed[kind] += [tuple(each) for each in found] != [place]

    assert sum(missed.values()) <= 0.005 * EACH * len(made.VALUES), missed


def test_2000_near_misses_are_left_alone() -> None:
    rng = random.Random(8)
    found: Counter[str] = Counter()
    for kind in made.VALUES:
        for _ in range(EACH):
            found.update(kinds(rng.choice(made.SENTENCES).format(made.wrong(kind, rng))))

    assert found.total() <= 0.01 * EACH * len(made.VALUES), found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The examples of the standards.
        ("GB 11643-1999: 11010519491231002X, 440524188001010014", ["id_card", "id_card"]),
        ("GB 32100: 91350100M000100Y43", ["uscc"]),
        ("ISO 13616: GB29 NWBK 6016 1331 9268 19", ["iban"]),
        ("Doc 9303: L898902C36UTO7408122F1204159ZE184226B<<<<<10", ["passport"]),
        ("4111 1111 1111 1111 and 3782 822463 10005", ["bank_card", "bank_card"]),
        # Beside each other, and beside other writing.
        ("13800138000 4111111111111111", ["phone", "bank_card"]),
        ("电话13800138000邮箱a.b@c.cn", ["phone", "email"]),
        ("13800138000,13900139000", ["phone", "phone"]),
        ("（+86）138-0013-8000", ["phone"]),
        ("110105 19491231 002x", ["id_card"]),
        ("姓名：王小明，年龄：40", ["name"]),
        ("Patient name: John Smith, 40", ["name"]),
        ("from 114.114.114.114", ["ip"]),
        # None of these is what it looks like.
        ("3.14159265358979323846", []),
        ("version 1.13800138000", []),
        ("abc13800138000def 0x4111111111111111", []),
        ("from 192.168.0.1, 10.0.0.1, 1.2.3.4 and 1.2.3.4.5.6", []),
        ("2023-01-05 10:20:30, 20230105102030", []),
        ("call 1-800-422-6237 or (888) 555-0100", []),
        ("078-05-1120 was printed in wallets", []),
        ("0000000000000000 4444444444444444444", []),
        ("@ home, user@localhost", []),
        ("", []),
    ],
)
def test_forms(text: str, expected: list[str]) -> None:
    assert kinds(text) == expected


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"patient": "王小明"}, 1),
        ({"Customer Name": "Anna-Maria O'Neill"}, 1),
        ({"a": [{"患者姓名": "欧阳小明"}]}, 1),
        ({"name": ["John Smith", "李雷"]}, 2),
        ({"patient": "The patient complained of pain in the left knee and was sent home."}, 0),
        ({"patient": "None", "name": "A-17", "customer": ""}, 0),
        ({"tools": [{"function": {"name": "weather", "parameters": {}}}]}, 0),
        ({"role": "tool", "name": "weather", "content": "x"}, 0),
    ],
)
def test_names_are_told_by_their_field(row: dict[str, Any], names: int) -> None:
    assert count(row)["name"] == names


def test_a_long_text_of_digits_is_searched_in_linear_time() -> None:
    for text in ("1" * 200_000, "1 " * 100_000, "a@" * 100_000, "1." * 100_000, "姓名：" * 50_000):
        start = time.process_time()
        find(text)

        assert time.process_time() - start < 3, text[:4]


def test_real_sets_hold_only_what_they_hold() -> None:
    """Ten thousand questions to a bank hold none; a dialogue tells phone numbers of hotels."""
    banking = Path(mst.__file__).parent / "demo/banking77/train.jsonl"
    hotels = scan_file(DATA / "crosswoz_sample.jsonl")

    assert scan_file(banking).found == ()
    assert {each.kind for each in hotels.found} == {"phone"}


COLUMNS = ("query", "response", "n", "f", "b", "x")
ROWS: list[dict[str, Any]] = [
    dict(zip(COLUMNS, values, strict=True))
    for values in (
        ("电话 13800138000 ok", "是", 1, 1.5, True, None),
        ("nothing", "a", 13800138000, -2.0, False, None),
        ('q, "x"\n4111 1111 1111 1111', "é", 3, 0.0, True, None),
    )
]


def written(path: Path) -> Path:
    """Write the rows as a file's name says."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(("parquet", "arrow")):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.Table.from_pylist(ROWS)
        if name.endswith("parquet"):
            parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_file(path, table.schema) as out:
                out.write_table(table)
        return path
    text = json.dumps(ROWS, ensure_ascii=False)
    if name.endswith("jsonl"):
        text = "\n\n".join(json.dumps(row) for row in ROWS) + "\n"
    elif name.endswith("txt"):
        text = "".join(str(row["query"]).replace("\n", " ") + "\n" for row in ROWS)
    elif name.endswith("sv"):
        from io import StringIO

        held = StringIO()
        writer = csv.DictWriter(held, list(ROWS[0]), delimiter="\t" if name[-3] == "t" else ",")
        writer.writeheader()
        writer.writerows(ROWS)
        text = held.getvalue()
    packed = gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode()
    if path.suffix == ".zst":
        packed = pytest.importorskip("zstandard").compress(text.encode())
    path.write_bytes(packed)
    return path


NAMES = (
    "a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.arrow", "a.jsonl.gz",
    "a.csv.zst",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_copy_holds_nothing_and_keeps_the_rest(name: str, tmp_path: Path) -> None:
    from mst.data.records import Record, records

    source = written(tmp_path / name)
    before = source.read_bytes()
    target = tmp_path / f"masked-{name}"
    found = scan_file(source)
    copy = mask_file(source, target, found)

    assert {each.kind for each in found.found} == {"phone", "bank_card"}
    assert (copy.found, copy.rows) == ((), 3)
    assert source.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([name, target.name])
    with records(source) as old, records(target) as new:
        for was, now in zip(old.items, new.items, strict=True):
            assert isinstance(was, Record)
            assert isinstance(now, Record)
            assert now.number == was.number
            assert {k: type(v) for k, v in now.fields.items()} == {
                k: type(v) for k, v in was.fields.items()
            }
            for key, value in was.fields.items():
                if now.fields[key] != value:
                    assert "[" in str(now.fields[key]) or now.fields[key] == 0
            if was.number == 2 and "jsonl" not in name and "txt" not in name:
                assert now.fields["query"] == "nothing"


def test_rows_are_named_by_number_and_never_quoted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(3)
    values = [value_of(rng) for value_of in made.VALUES.values()]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in values), encoding="utf-8")
    plain = cli.main(["data", "scan", str(path)])
    as_json = cli.main(["data", "scan", str(path), "--json"])
    out, err = capfd.readouterr()
    report = json.loads(out[out.index("{") :])

    assert (plain, as_json) == (0, 0)
    assert report["values"] == {kind: int(kind in made.VALUES) for kind in KINDS}
    rows = {each["kind"]: each["rows"] for each in report["files"][0]["found"]}
    assert rows == {kind: [row] for row, kind in enumerate(made.VALUES, start=1)}
    for each in values:
        assert each not in out + err


def test_keys_are_searched_and_masked_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": {"13800138000": 1, "13900139000": 2}}\n', encoding="utf-8")
    mask_file(path, tmp_path / "b.jsonl", scan_file(path))

    assert json.loads((tmp_path / "b.jsonl").read_text()) == {
        "text": {"[PHONE]": 1, "[PHONE] 2": 2}
    }


def test_what_stands_beside_the_rows_of_a_json_file_is_masked_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"made by": "a@b.cn", "data": [{"text": "x"}]}', encoding="utf-8")
    mask_file(path, tmp_path / "b.json", scan_file(path))

    assert "a@b.cn" not in (tmp_path / "b.json").read_text()


def test_a_copy_never_replaces_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "a.jsonl")
    target = tmp_path / "b.jsonl"
    target.write_text("kept")
    code = cli.main(["data", "scan", str(source), "--mask", str(target)])

    assert code == 1
    assert "never replaces" in capfd.readouterr().err
    assert target.read_text() == "kept"
    for name, said in (("b.csv", ".jsonl"), ("no/b.jsonl", "no directory")):
        assert cli.main(["data", "scan", str(source), "--mask", str(tmp_path / name)]) == 1
        assert said in " ".join(capfd.readouterr().err.split())


def test_a_row_that_cannot_be_read_is_told_and_stops_a_copy(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "13800138000"}\n{"text": "139001390\xff"}\n')
    code = cli.main(["data", "scan", str(path), "--mask", str(tmp_path / "b.jsonl")])
    out, err = capfd.readouterr()

    assert code == 1
    assert "not searched" in out
    assert "row 2" in err
    assert "139001390" not in out + err
    assert not (tmp_path / "b.jsonl").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "a.jsonl")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mst.seal.personal_data.mask.sync_file", full)
    with pytest.raises(DataError, match="No space left"):
        mask_file(source, tmp_path / "b.jsonl", scan_file(source))

    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_place_without_hard_links_gets_a_copy_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "a.jsonl")

    def refuse(*paths: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    mask_file(source, tmp_path / "b.jsonl", scan_file(source))

    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
