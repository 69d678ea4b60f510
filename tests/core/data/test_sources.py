from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mst.data.compressed import opened
from mst.data.formats import Reading, iter_rows, read, row_reader
from mst.data.prepare import parted
from mst.data.refusals import RowError
from mst.data.rows import Row
from mst.data.sources import absolute_spec, find_source
from mst.data.text_files import lines
from mst.request import TrainRequest

Refuses = Callable[..., str]
Jsonl = Callable[..., str]

SECRET = "Frau Müller 王小明 +49-151"


def pairs(count: int, word: str = "q") -> list[dict[str, str]]:
    return [{"query": f"{word}{index}", "response": "a"} for index in range(count)]


def prompts(rows: Iterator[Row] | tuple[Row, ...]) -> list[str]:
    return [row.messages[0].content for row in rows]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
def test_text_files_may_be_compressed(tmp_path: Path, name: str, suffix: str) -> None:
    content = {
        "a.jsonl": '{"query": "00000", "response": "NA"}\n',
        "a.json": '[{"query": "00000", "response": "NA"}]',
        "a.csv": "query,response\n00000,NA\n",
        "a.tsv": "query\tresponse\n00000\tNA\n",
        "a.txt": "00000\n\nNA\n",
    }[name].encode()
    path = tmp_path / (name + suffix)
    if suffix == ".gz":
        path.write_bytes(gzip.compress(content[:5]) + gzip.compress(content[5:]))
    else:
        import zstandard

        pack = zstandard.ZstdCompressor().compress
        path.write_bytes(pack(content[:5]) + pack(content[5:]))
    data = read([str(path)])
    texts: list[str | None] = []
    for row in data.rows:
        texts += [m.content for m in row.messages] or [row.text]

    assert texts == ["00000", "NA"]
    assert data.files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone\r\n\r\n two \n", encoding="utf-8")
    rows = read([str(path)]).rows

    assert [(row.number, row.text) for row in rows] == [(1, "one"), (3, " two ")]


@pytest.mark.parametrize("kind", ["parquet", "file.arrow", "stream.arrow"])
def test_tables_keep_lists_and_text_as_they_are(tmp_path: Path, kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    turns = [
        {"role": "user", "content": "00000", "tool_calls": None},
        {"role": "assistant", "content": "3.3", "tool_calls": None},
    ]
    table = pyarrow.table({"messages": [turns] * 600, "id": list(range(600))})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        new = pyarrow.ipc.new_file if kind == "file.arrow" else pyarrow.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    data = read([str(path)])

    assert [row.number for row in data.rows] == list(range(1, 601))
    assert [m.content for m in data.rows[599].messages] == ["00000", "3.3"]
    assert data.files[0].kind == kind.split(".")[-1]
    assert data.files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_table_without_pyarrow_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from mst.data.formats import read\n"
        "try: read([sys.argv[1]])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.parquet")], capture_output=True, text=True
    )

    assert done.stdout.startswith("DataError")
    assert "pip install 'mst-train[data]'" in done.stdout


def test_directories_and_globs_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path / "b" / "2.jsonl", pairs(1, "z"))
    write(tmp_path / "b" / "10.jsonl", pairs(1, "y"))
    write(tmp_path / "a.jsonl", pairs(1, "x"))
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "part").write_text("x")

    assert prompts(read([str(tmp_path)]).rows) == ["x0", "y0", "z0"]
    assert prompts(iter_rows(f"{tmp_path}/b/*.jsonl")) == ["y0", "z0"]
    assert prompts(iter_rows(f"{tmp_path}/**/*.jsonl#2")) == ["x0", "y0"]


def test_a_directory_with_foreign_files_names_them(tmp_path: Path, refuses: Refuses) -> None:
    write(tmp_path / "a.jsonl", pairs(1))
    (tmp_path / "notes.docx").write_text(SECRET)

    refuses(lambda: read([str(tmp_path)]), "notes.docx", "*.jsonl")
    refuses(lambda: read([f"{tmp_path}/*.csv"]), "No data file matches")


def test_a_directory_is_never_trained_on_together_with_its_test_files(
    tmp_path: Path, refuses: Refuses
) -> None:
    write(tmp_path / "train.jsonl", pairs(1))
    write(tmp_path / "test-00000.jsonl", pairs(1))

    refuses(lambda: read([str(tmp_path)]), "test-00000.jsonl", "--val-dataset")


def test_the_first_rows_are_taken_over_all_files_of_a_source(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pairs(3, "x"))
    write(tmp_path / "b.jsonl", pairs(3, "y"))
    write(tmp_path / "c.jsonl", pairs(3, "z"))
    data = read([f"{tmp_path}#4"])

    assert prompts(data.rows) == prompts(iter_rows(f"{tmp_path}#4")) == ["x0", "x1", "x2", "y0"]
    assert [(each.rows, each.selection) for each in data.files] == [
        (3, "the first 4"),
        (1, "the first 4"),
    ]


def test_the_hash_is_of_the_whole_file_when_few_rows_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(50_000))

    assert read([f"{path}#2"]).files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_sample_is_drawn_by_the_seed_and_kept_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pairs(50, "x"))
    write(tmp_path / "b.jsonl", pairs(50, "y"))
    spec = f"{tmp_path}#~20"
    one, other = (prompts(read([spec], Reading(seed=seed)).rows) for seed in (1, 2))

    assert one == prompts(iter_rows(spec, Reading(seed=1)))
    assert len(set(one)) == len(set(other)) == 20
    assert one != other
    assert one == sorted(one, key=lambda text: (text[0], int(text[1:])))
    assert {text[0] for text in one} == {"x", "y"}
    assert sum(each.rows for each in read([spec]).files) == 20


def test_a_file_whose_name_ends_like_a_selection_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "talk#2" / "a.jsonl", pairs(3))

    assert len(read([f"{tmp_path}/talk#2"]).rows) == 3
    assert len(read([f"{tmp_path}/talk#2#1"]).rows) == 1


def test_a_spec_is_made_absolute_with_its_selection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert absolute_spec("a.jsonl#~9") == f"{tmp_path}/a.jsonl#~9"
    assert absolute_spec("d/*.csv#9") == f"{tmp_path}/d/*.csv#9"


def test_bad_rows_are_skipped_counted_and_reported(jsonl: Jsonl, refuses: Refuses) -> None:
    good = {"query": "q", "response": "a"}
    bad = {"query": SECRET, "response": ""}
    path = jsonl(f"{{{SECRET}", good, bad, [SECRET], bad, good)
    data = read([path], Reading(on_bad_row="skip"))

    assert [row.number for row in data.rows] == [2, 6]
    assert data.files[0].rows == 2
    assert len(data.files[0].skipped) == 3
    assert "'response' is the assistant's answer" in data.files[0].skipped[0]
    assert "2 (row 3, 5)" in data.files[0].skipped[0]
    assert SECRET not in "".join(data.files[0].skipped)
    refuses(lambda: read([path]), "row 1", "not valid JSON")
    refuses(
        lambda: read([jsonl(good | {"response": " "})], Reading(on_bad_row="skip")),
        "none of its rows",
        "row 1",
    )


def test_a_fault_names_the_option_that_was_typed(tmp_path: Path, refuses: Refuses) -> None:
    empty, bad = tmp_path / "empty.jsonl", tmp_path / "bad.jsonl"
    empty.write_text("")
    write(bad, [{"query": "q", "response": " "}])
    (tmp_path / "none").mkdir()
    reading = Reading(on_bad_row="skip", option="--calibration")
    for path in (empty, bad, tmp_path / "none"):
        refuses(lambda path=path: read([str(path)], reading), "another --calibration.")

    refuses(lambda: read([], reading), "Pass --calibration FILE")
    good = read([str(write(tmp_path / "good.jsonl", pairs(2)))])
    request = TrainRequest(val_dataset=(str(empty),))
    refuses(lambda: parted(request, good, Reading()), "another --val-dataset.")


def test_a_line_alone_is_read_as_with_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(3))
    source = find_source(str(path))
    reader = row_reader(source.files[0], source)
    content = path.read_bytes().splitlines(keepends=True)

    assert [reader.parse_line(i, line) for i, line in enumerate(content, 1)] == list(
        iter_rows(str(path))
    )
    with pytest.raises(RowError, match="row 7"):
        reader.parse_line(7, b'{"query": "q"}')


def test_rows_are_read_one_after_another(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*pairs(3), {"query": "q"}])
    rows = iter_rows(str(path))

    assert prompts(tuple(next(rows) for _ in range(3))) == ["q0", "q1", "q2"]
    with pytest.raises(RowError, match="row 4"):
        next(rows)


def test_a_line_past_the_limit_is_refused_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 3_000_000 + b"\nyes\n")
    with path.open("rb") as stream:
        (first, error), (second, line) = lines(str(path), stream, max_bytes=1 << 20)

    assert (first, second, line) == (1, 2, b"yes\n")
    assert isinstance(error, RowError)
    assert "row 1: a line may have 1 MiB" in str(error)


def test_a_line_of_100_mb_is_refused_without_holding_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(300):
            file.write(b"x" * (1 << 20))
    code = (
        "import resource, sys\nfrom mst.data.formats import read\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read([sys.argv[1]])\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    told, mebibytes = done.stdout.splitlines()

    assert told.startswith("RowError")
    assert "row 1: a line may have 64 MiB" in told
    assert int(mebibytes) < 200


def test_a_decompression_bomb_is_refused_while_it_unpacks(tmp_path: Path, refuses: Refuses) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"x\n" * (4 << 20)))

    def unpack() -> None:
        with opened(path, max_ratio_from_bytes=1 << 20) as source:
            while source.stream.read(1 << 16):
                pass

    refuses(unpack, "a.txt.gz", "100 times its size", "decompress it by hand")
    assert len(read([f"{path}#5"]).rows) == 5


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, refuses: Refuses, suffix: str) -> None:
    import zstandard

    content = (SECRET + "\n").encode() * 1000
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed[:-1])
    refuses(lambda: read([str(path)]), path.name, "cannot be decompressed (EOFError)")
    path.write_bytes(content)
    refuses(lambda: read([str(path)]), path.name, "cannot be decompressed")


BAD_TEXT: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("a.txt", SECRET.encode("utf-16"), ("it is UTF-16", "iconv")),
    ("a.txt", SECRET.encode("utf-32"), ("it is UTF-32", "iconv -f UTF-32")),
    ("a.jsonl", SECRET.encode("utf-16-le"), ("row 1", "NUL bytes", "UTF-16LE")),
    ("a.jsonl", b'{"text": "a\0b"}', ("row 1", "NUL bytes")),
    ("a.csv", b"text\n\0\n", ("row 1", "NUL bytes")),
    ("a.txt", SECRET.encode("gb18030", "ignore"), ("row 1", "UTF-8", "byte")),
    ("a.jsonl", gzip.compress(b"{}", mtime=0), ("named as text, but it is gzip",)),
    ("a.json", b"PAR1", ("it is parquet",)),
    ("a.zip", b"PK", ("'.zip'", ".jsonl")),
    ("a.parquet.gz", b"PK", ("'.gz'", ".parquet")),
    ("a.parquet", b"x" * 100, ("cannot be read as parquet",)),
    ("a.arrow", b"x" * 100, ("cannot be read as arrow",)),
    ("a.txt", b"", ("is empty",)),
]


@pytest.mark.parametrize(("name", "data", "needles"), BAD_TEXT)
def test_what_is_no_text_is_named(
    tmp_path: Path, refuses: Refuses, name: str, data: bytes, needles: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(data)

    refuses(lambda: read([str(tmp_path / name)]), name, *needles)


INFO = {
    "chats": {
        "file_name": "chats.json",
        "formatting": "sharegpt",
        "num_samples": 1,
        "columns": {"messages": "talk"},
        "tags": {
            "role_tag": "who", "content_tag": "what", "user_tag": "asker", "assistant_tag": "bot",
        },
    },
    "tasks": {
        "file_name": "tasks.jsonl",
        "columns": {"prompt": "task", "query": "more", "response": "done"},
    },
    "pairs": {
        "file_name": "pairs.jsonl",
        "ranking": True,
        "columns": {"prompt": "task", "chosen": "better", "rejected": "worse"},
    },
    "hub": {"hf_hub_url": "someone/something"},
}  # fmt: skip


@pytest.fixture
def info(tmp_path: Path) -> str:
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    turns = [{"who": "asker", "what": "q"}, {"who": "bot", "what": "a"}]
    (tmp_path / "chats.json").write_text(json.dumps([{"talk": turns}] * 2))
    write(tmp_path / "tasks.jsonl", [{"task": "t", "more": "m", "done": "d"}])
    write(tmp_path / "pairs.jsonl", [{"task": "t", "better": "a", "worse": "b"}])
    return str(tmp_path)


def test_registered_data_sets_are_read_by_name(info: str) -> None:
    data = read(["chats", "tasks", "pairs"], Reading(dataset_info=info))

    assert [[m.content for m in row.messages] for row in data.rows] == [
        ["q", "a"],
        ["t\nm", "d"],
        ["t", "a"],
    ]
    assert [each.shape for each in data.files] == ["sharegpt", "prompt-response", "preference"]
    assert absolute_spec("chats#3", info) == "chats#3"


def test_what_is_not_registered_or_not_here_is_named(info: str, refuses: Refuses) -> None:
    def reading(name: str, where: str = info) -> Callable[[], object]:
        return lambda: read([name], Reading(dataset_info=where))

    refuses(reading("chat"), "'chat'", "nearest there: chats")
    refuses(reading("hub"), "'hf_hub_url'", "fetches nothing", "'file_name'")
    refuses(reading("chats", info + "/none.json"), "--dataset-info", "none.json")
