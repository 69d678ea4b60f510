from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mst.data.formats import read
from mst.data.rows import DataSet, Message

Refuses = Callable[..., str]
Jsonl = Callable[..., str]

SECRET = "Frau Müller 王小明 +49-151"
GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def chat(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


def turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_the_demo_is_read_as_messages_with_the_hash_of_its_bytes(demo: DataSet) -> None:
    train, test = demo.files

    assert (train.rows, test.rows) == (1200, 240)
    assert (train.kind, train.shape, train.columns) == ("jsonl", "messages", ("messages=messages",))
    assert train.sha256 == hashlib.sha256(Path(train.path).read_bytes()).hexdigest()
    assert [m.role for m in demo.rows[0].messages] == ["system", "user", "assistant"]
    assert demo.rows[1200].number == 1
    assert demo.rows[1200].file == test.path


def test_chinese_dialogues_of_many_turns_are_read(crosswoz: DataSet) -> None:
    assert len(crosswoz.rows) == 20
    assert crosswoz.rows[0].messages[0].content.startswith("你好")


def test_alpaca_joins_instruction_and_input_with_a_line_break(jsonl: Jsonl) -> None:
    path = jsonl(
        {"instruction": "Name it.", "output": "Oak"},
        {"instruction": "Name it.", "input": "a tree", "output": "Oak", "system": "Be brief."},
        {"instruction": "And?", "input": None, "output": "Elm", "history": [["Hi", "Hello"]]},
    )

    rows, files = read([path]).rows, read([path]).files

    assert rows[0].messages == (Message("user", "Name it."), Message("assistant", "Oak"))
    assert rows[1].messages[0] == Message("system", "Be brief.")
    assert rows[1].messages[1] == Message("user", "Name it.\na tree")
    assert [m.content for m in rows[2].messages] == ["Hi", "Hello", "And?", "Elm"]
    assert files[0].shape == "alpaca"
    assert "input=input" in files[0].columns


@pytest.mark.parametrize("prompt", ["query", "prompt", "question", "problem"])
@pytest.mark.parametrize("response", ["response", "answer", "completion", "output", "target"])
def test_every_pair_of_synonyms_is_a_prompt_and_a_response(
    jsonl: Jsonl, prompt: str, response: str
) -> None:
    data = read([jsonl({prompt: "q", response: "a", "system_prompt": "s", "id": 7})])

    assert [m.content for m in data.rows[0].messages] == ["s", "q", "a"]
    assert data.files[0].shape == "prompt-response"
    assert data.files[0].columns == (
        f"prompt={prompt}",
        f"response={response}",
        "system=system_prompt",
    )


def test_csv_cells_stay_the_text_they_are(tmp_path: Path) -> None:
    path = tmp_path / "Rows.CSV"
    path.write_bytes(
        'query,response\r\n00000,3.3\r\nNA,"第一行\n第二行, ""ja"""\r\n\r\nnull,true\r\n'.encode(
            "utf-8-sig"
        )
    )

    data = read([str(path)])

    assert [tuple(m.content for m in row.messages) for row in data.rows] == [
        ("00000", "3.3"),
        ("NA", '第一行\n第二行, "ja"'),
        ("null", "true"),
    ]
    assert [row.number for row in data.rows] == [1, 2, 3]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_json_array_may_stand_alone_or_under_data(tmp_path: Path, wrapped: bool) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "data": [GOOD, GOOD]} if wrapped else [GOOD, GOOD]))

    assert [row.number for row in read([str(path)]).rows] == [1, 2]


def test_jsonl_rows_are_numbered_by_line_and_keep_unicode_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "a\u2028b", "response": "c"}\n\n{"query": "d", "response": "e"}\n')

    data = read([str(path)])

    assert [row.number for row in data.rows] == [1, 3]
    assert data.rows[0].messages[0].content == "a\u2028b"


def test_loss_may_be_given_for_each_message(jsonl: Jsonl) -> None:
    data = read([jsonl(chat(turn("user", "q"), turn("assistant", "a", loss=False)))])

    assert data.rows[0].messages[1].loss is False
    assert data.rows[0].messages[0].loss is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
        min_size=1,
    )
)
def test_any_text_survives_a_jsonl_file(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "any.jsonl"
    rows = [chat(turn("user", text), turn("assistant", "a")) for text in texts]
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), newline="\n"
    )

    assert [row.messages[0].content for row in read([str(path)]).rows] == texts


BAD_ROWS: list[tuple[Any, tuple[str, ...]]] = [
    (chat(turn("user", SECRET), turn("assistant", 7)), ("message 2", "'content'", "a number")),
    (chat(turn("user", SECRET), turn("assistant", None)), ("message 2", "'content'", "null")),
    (chat(turn("user", [SECRET]), turn("assistant", "a")), ("message 1", "'content'", "a list")),
    (chat(turn(SECRET, "q"), turn("assistant", "a")), ("message 1", "'role'", "system, user")),
    (chat(turn("human", SECRET), turn("gpt", "a")), ("'role'", "For 'human' write 'user'")),
    (chat(turn("User", SECRET), turn("gpt", "a")), ("'role'", "For 'User' write 'user'")),
    (chat({"role": "user", "contents": SECRET}), ("'content'", "nearest there: 'contents'")),
    (chat({"role": "user", SECRET: "q"}), ("'content'", "a name of")),
    (chat(SECRET), ("message 1", "'role' and 'content'", "found text")),
    (chat(turn("user", SECRET)), ("'messages'", "assistant turn")),
    (chat(), ("'messages'", "assistant turn")),
    (chat(turn("user", SECRET), turn("assistant", " \n")), ("message 2", "'content'", "empty")),
    (chat(turn("user", SECRET, loss=True), turn("assistant", "a")), ("'loss'", "'user'")),
    (chat(turn("user", "q"), turn("assistant", "a", loss=SECRET)), ("'loss'", "found text")),
    (
        chat(turn("user", SECRET), turn("assistant", "a", tool_calls=[SECRET])),
        ("'tool_calls'", "each an object", "found text"),
    ),
    (chat(turn("user", SECRET), turn("assistant", "a\ud800")), ("'content'", "surrogate")),
    ({"messages": SECRET}, ("'messages'", "must be a list", "found text")),
    ({"message": SECRET}, ("'messages'", "nearest there: 'message'")),
    ([SECRET], ("an object", "a list")),
    (f'{{"messages": "{SECRET}", }}', ("line 2", "column", "not valid JSON")),
    (f'{{"messages": "{SECRET}', ("line 2", "column", "Unterminated string")),
    ('{"messages": ' + "[" * 100_000, ("line 2", "nested too deeply")),
    ('{"messages": ' + "1" * 5000 + "}", ("line 2", "too many digits")),
]


@pytest.mark.parametrize(("row", "needles"), BAD_ROWS, ids=lambda value: str(value)[-40:])
def test_a_bad_row_is_named_by_file_row_and_field_and_never_quoted(
    jsonl: Jsonl, refuses: Refuses, row: Any, needles: tuple[str, ...]
) -> None:
    path = jsonl(GOOD, row)
    place = () if isinstance(row, str) else (", row 2",)

    refuses(lambda: read([path]), "rows.jsonl", *place, *needles)


BAD_FILES: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("a.csv", f"words,category\n{SECRET},x\n".encode(), ("found 'words', 'category'", "accepted")),
    ("a.csv", f"{SECRET},x\n{SECRET},y\n".encode(), ("a name of", "accepted")),
    ("a.csv", f"query;response\n{SECRET};x\n".encode(), ("save the file with commas",)),
    ("a.csv", f"query,response\nq,a\n{SECRET},a,b\n".encode(), ("row 2", "2 cells", "found 3")),
    ("a.csv", f"query,response\nq,a\n{SECRET}\n".encode(), ("row 2", "2 cells", "found 1")),
    ("a.csv", f'query,response\nq,a\n"{SECRET},a\n'.encode(), ("row 2", "not valid CSV")),
    ("a.csv", f'query,response\n"{SECRET}" x,a\n'.encode(), ("row 1", "not valid CSV")),
    ("a.csv", b"query,response\nq," + b"x" * 200_000, ("row 1", "field larger")),
    ("a.csv", f"query,query\n{SECRET},a\n".encode(), ("'query' more than once",)),
    ("a.csv", f"query,response\n{SECRET},\n".encode(), ("row 1", "'response'", "empty")),
    ("a.csv", f"messages\n{SECRET}\n".encode(), ("row 1", "'messages'", "a list")),
    (
        "a.csv",
        f"instruction,output,history\nq,a,{SECRET}\n".encode(),
        ("row 1", "'history'", ".jsonl"),
    ),
    ("a.csv", b"query,response\n", ("holds no rows",)),
    ("a.json", b"[]", ("holds no rows",)),
    ("a.json", f'[\n{{"q": "{SECRET}"}}\n{{}}]'.encode(), ("line 3, column 1", "not valid JSON")),
    ("a.json", json.dumps([SECRET]).encode(), ("row 1", "an object", "found text")),
    ("a.json", json.dumps({"rows": [SECRET]}).encode(), ("'data'", "an object")),
    ("a.json", f'{{"a": "{SECRET}"}}\n{{}}'.encode(), ("line 2", "name the file .jsonl")),
    ("a.jsonl", b"", ("is empty",)),
    ("a.jsonl", b"\n \n", ("is empty",)),
    ("a.jsonl", f'[{{"q": "{SECRET}"}}]'.encode(), ("row 1", "named .json")),
    ("a.jsonl", f"\n{SECRET}".encode("gb18030", "ignore"), ("UTF-8", "byte", "line 2")),
    (
        "a.csv",
        f"query,response\n{SECRET},a".encode("utf-16"),
        ("UTF-8", "it is UTF-16", "iconv -f UTF-16"),
    ),
    ("a.parquet", b"PAR1", ("cannot be read as parquet", "damaged")),
    ("rows", b"x", ("suffix ''", ".jsonl, .json, .csv")),
]


@pytest.mark.parametrize(("name", "data", "needles"), BAD_FILES)
def test_a_bad_file_is_named_with_the_place_and_never_quoted(
    tmp_path: Path, refuses: Refuses, name: str, data: bytes, needles: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(data)

    refuses(lambda: read([str(tmp_path / name)]), name, *needles)


def test_a_path_that_is_no_file_says_what_is_there(jsonl: Jsonl, refuses: Refuses) -> None:
    path = Path(jsonl(GOOD, name="train.jsonl"))

    refuses(lambda: read([]), "--dataset")
    refuses(lambda: read([str(path.parent / "tain.jsonl")]), "No data file", "nearest", "train.j")
    refuses(lambda: read([str(path.parent / "no" / "a.csv")]), "there is no directory")


def test_a_printed_traceback_holds_no_row(jsonl: Jsonl) -> None:
    path = jsonl(GOOD, f'{{"messages": "{SECRET}')
    try:
        read([path])
    except Exception as error:
        printed = "".join(traceback.format_exception(error))

    assert SECRET not in printed
