from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mst import cli
from mst.data.check import check_data, has_problems
from mst.data.formats import Reading

Jsonl = Callable[..., str]

SECRET = "Frau Müller 王小明 +49-151"
SKIP = Reading(on_bad_row="skip")


def chat(question: str, answer: Any = "yes") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture
def check(
    model_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run `mst data check` with a model's tokenizer; return its code and all that it prints."""
    model = model_dirs["minimind"]
    (model / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')

    def run(*args: str) -> tuple[int, str]:
        code = cli.main(["data", "check", *args, "--model", str(model)])
        printed = capsys.readouterr()
        return code, " ".join((printed.out + printed.err).split())

    return run


Check = Callable[..., tuple[int, str]]


def test_what_is_found_is_told_without_a_word_of_the_rows(jsonl: Jsonl, check: Check) -> None:
    path = jsonl(
        chat(SECRET), chat(SECRET), chat(""), chat(SECRET * 20), chat(SECRET, None), {SECRET: 1}
    )
    code, out = check(path)

    assert code == 1
    assert "4 rows, jsonl, messages (messages=messages)" in out
    assert "duplicates: 1 (row 2)" in out
    assert "empty turns: 1 (row 3)" in out
    assert "'content' must be text or a list, found null: 1 (row 5). Mend the row." in out
    assert "1 rows (25.0%) are longer than --max-length 64" in out
    assert "Latin" in out
    assert "Han" in out
    for part in (SECRET, "Müller", "王小明", "+49"):
        assert part not in out


def test_the_histogram_counts_every_row_once(jsonl: Jsonl, check: Check) -> None:
    path = jsonl(*(chat("w " * 2**power) for power in range(8)))
    code, out = check(path, "--json", "--max-length", "100")
    lengths = json.loads(out)["lengths"]
    bins = [each["tokens"] for each in lengths["histogram"]]

    assert code == 0
    assert sum(each["rows"] for each in lengths["histogram"]) == 8
    assert all(start & (start - 1) == 0 for start in bins)
    assert bins == sorted(bins)
    assert lengths["median"] <= lengths["p90"] <= lengths["p99"] <= lengths["longest"]
    assert (lengths["max_length"], lengths["too_long"]) == (100, 1)
    assert check(path)[1].count("█") > 0


def test_json_holds_all_that_is_printed(jsonl: Jsonl, check: Check) -> None:
    bad = jsonl(chat(SECRET), f"{{{SECRET}", chat(SECRET, ""), name="bad.jsonl")
    code, out = check(bad, "--json")
    (file,) = json.loads(out)["files"]

    assert code == 1
    assert (file["rows"], file["shape"], file["problem"]) == (1, "messages", None)
    assert [(each["rows"], each["numbers"]) for each in file["refused"]] == [(1, [2]), (1, [3])]
    assert SECRET not in out


def test_rows_are_shown_on_a_terminal_alone(
    jsonl: Jsonl,
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = jsonl(chat("first"), chat("second\x1b[2J"), chat("third"))
    code, out = check(path, "--show", "2")

    assert code == 2
    assert "needs a terminal" in out
    assert "first" not in out

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    code, out = check(path, "--show", "2")

    assert code == 0
    assert "[user] first" in out
    assert "row 2 [user] second\\x1b[2J" in out
    assert "third" not in out
    assert check(path, "--show", "2", "--json")[0] == 2


def test_rows_that_are_also_held_out_are_counted(jsonl: Jsonl, check: Check) -> None:
    train = jsonl(*(chat(f"q{number}") for number in range(4)), name="a.jsonl")
    val = jsonl(chat("q1"), chat("new"), name="b.jsonl")

    assert "overlap 1 rows are in both" in check(train, "--val-dataset", val)[1]


def test_a_label_outside_the_set_is_named(jsonl: Jsonl, check: Check) -> None:
    rows = [chat(f"q{number}", answer) for number in range(6) for answer in ("yes", "no")]
    train = jsonl(*rows, name="a.jsonl")
    val = jsonl(chat("q", "no"), chat("q", SECRET), chat("q", "x" * 70), name="b.jsonl")
    code, out = check(train, "--val-dataset", val)

    assert code == 1
    assert "answers 2 different ones: a classification" in out
    assert "answer is none of the 2 answers of --dataset: 1 (row 2). Mend the answer" in out
    assert SECRET not in out


def test_every_file_is_looked_at_though_one_cannot_be_read(jsonl: Jsonl, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(SECRET.encode("utf-16"))
    good = jsonl(chat("q"), name="b.jsonl")
    found = check_data([str(tmp_path / "a.jsonl"), good], (), SKIP, None, 2048)

    assert [each.rows for each in found.files] == [0, 1]
    assert "UTF-16" in str(found.files[0].problem)
    assert found.lengths is None
    assert has_problems(found)


def test_the_first_rows_alone_are_checked_when_no_more_are_taken(jsonl: Jsonl) -> None:
    path = jsonl(chat("q"), chat("r"), chat("s", None))

    assert not has_problems(check_data([f"{path}#2"], (), SKIP, None, 2048))
    assert has_problems(check_data([f"{path}#~2"], (), SKIP, None, 2048))


def test_columns_and_registered_names_are_taken(jsonl: Jsonl, check: Check, tmp_path: Path) -> None:
    jsonl({"ask": "q", "reply": "a"}, name="own.jsonl")
    info = {"mine": {"file_name": "own.jsonl", "columns": {"prompt": "ask", "response": "reply"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))

    for args in (
        [str(tmp_path / "own.jsonl"), "--columns", "ask=prompt", "reply=response"],
        ["mine", "--dataset-info", str(tmp_path)],
    ):
        code, out = check(*args)

        assert code == 0
        assert "(prompt=ask, response=reply)" in out


def test_a_column_that_no_file_has_is_named_after_what_they_have(
    jsonl: Jsonl, check: Check
) -> None:
    code, out = check(jsonl({"query": "q", "response": "a"}), "--columns", "sytem=system")

    assert code == 1
    assert "(prompt=query, response=response)" in out
    assert "--columns sytem=system: no data file uses such a column" in out


def test_an_action_or_path_that_is_not_there_is_named(
    jsonl: Jsonl, check: Check, tmp_path: Path
) -> None:
    assert cli.main(["data"]) == 2
    (tmp_path / "empty.jsonl").write_text("")
    _, out = check(jsonl(chat("q")), "--val-dataset", str(tmp_path / "empty.jsonl"))
    assert "Add at least one row, or pass another --val-dataset." in out
    code, out = check(str(tmp_path / "none.jsonl"))

    assert code == 1
    assert "No data file at" in out
