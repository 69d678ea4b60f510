from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from mst.data.formats import Reading, read
from mst.data.rows import Message, Row

Refuses = Callable[..., str]
Jsonl = Callable[..., str]

SECRET = "Frau Müller 王小明 +49-151"
USER, ANSWER, WORSE = (
    Message("user", "q"),
    Message("assistant", "good"),
    Message("assistant", "bad"),
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def only(path: str, *columns: str) -> Row:
    (row,) = read([path], Reading(columns=columns)).rows
    return row


def roles(row: Row) -> list[str]:
    return [message.role for message in row.messages]


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def shared(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": content} for role, content in turns]


def test_sharegpt_turns_are_read_under_their_own_roles(jsonl: Jsonl) -> None:
    path = jsonl(
        {
            "system": "s",
            "tools": json.dumps([{"name": "f"}]),
            "conversations": shared(
                ("human", "q"),
                ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                ("observation", "7"),
                ("gpt", "good"),
            ),
        }
    )
    row = only(path)

    assert roles(row) == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2].tool_calls == (CALL,)
    assert row.messages[2].content == ""
    assert row.tools == ({"name": "f"},)
    assert read([path]).files[0].shape == "sharegpt"


def test_sharegpt_pairs_are_read_as_turns(jsonl: Jsonl) -> None:
    row = only(jsonl({"conversation": [{"human": "q", "assistant": "a"}] * 2}))

    assert [m.content for m in row.messages] == ["q", "a", "q", "a"]


def test_openai_tool_calls_are_kept_with_their_arguments_parsed(jsonl: Jsonl) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm", "weight": 0.5},
    ]
    row = only(jsonl({"messages": turns, "tools": [{"type": "function"}]}))

    assert roles(row) == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[1].content == "q!"
    assert row.messages[2].tool_calls == ({"id": "1", **CALL},)
    assert (row.messages[3].tool_call_id, row.messages[3].name) == ("1", "f")
    assert (row.messages[4].reasoning, row.messages[4].weight) == ("hm", 0.5)


def test_calls_of_ms_swift_that_follow_each_other_are_one_turn(jsonl: Jsonl) -> None:
    text = '{"name": "f", "arguments": {"x": 1}}'
    row = only(
        jsonl(
            {
                "messages": said(
                    ("user", "q"),
                    ("assistant", "I look"),
                    ("tool_call", text),
                    ("tool_call", text),
                    ("tool_response", "7"),
                    ("tool_response", "8"),
                    ("assistant", "a"),
                )
            }
        )
    )

    assert roles(row) == ["user", "assistant", "tool", "tool", "assistant"]
    assert row.messages[1].tool_calls == (CALL, CALL)
    assert row.messages[1].content == "I look"


PREFERENCES: list[dict[str, Any]] = [
    {"prompt": "q", "chosen": "good", "rejected": "bad"},
    {"instruction": "q", "output": "x", "chosen": "good", "rejected": "bad"},
    {"query": "q", "response": "good", "rejected_response": "bad"},
    {
        "prompt": said(("user", "q")),
        "chosen": said(("assistant", "good")),
        "rejected": said(("assistant", "bad")),
    },
    {
        "chosen": said(("user", "q"), ("assistant", "good")),
        "rejected": said(("user", "q"), ("assistant", "bad")),
    },
    {
        "prompt": "q",
        "messages": said(("user", "q"), ("assistant", "good")),
        "chosen": said(("user", "q"), ("assistant", "good")),
        "rejected": said(("user", "q"), ("assistant", "bad")),
    },
    {
        "conversations": shared(("human", "q")),
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    {"messages": said(("user", "q"), ("assistant", "good")), "rejected_response": "bad"},
    {
        "messages": said(("user", "q"), ("assistant", "good")),
        "rejected_messages": said(("user", "q"), ("assistant", "bad")),
    },
    {
        "chosen_messages": said(("user", "q"), ("assistant", "good")),
        "rejected_messages": said(("user", "q"), ("assistant", "bad")),
    },
]


@pytest.mark.parametrize("row", PREFERENCES, ids=lambda row: ",".join(row))
def test_every_kind_of_preference_is_two_whole_conversations(
    jsonl: Jsonl, row: dict[str, Any]
) -> None:
    path = jsonl(row)

    assert only(path).messages == (USER, ANSWER)
    assert only(path).rejected == (USER, WORSE)
    assert read([path]).files[0].shape == "preference"


def test_a_system_column_stands_before_both_conversations(jsonl: Jsonl) -> None:
    row = only(jsonl({"system": "s", "prompt": "q", "chosen": "good", "rejected": "bad"}))

    assert row.messages[0] == row.rejected[0] == Message("system", "s")


KTO: list[tuple[dict[str, Any], bool]] = [
    ({"messages": said(("user", "q"), ("assistant", "good")), "label": True}, True),
    ({"messages": said(("user", "q"), ("assistant", "good")), "kto_tag": 0}, False),
    ({"prompt": "q", "completion": "good", "label": False}, False),
    (
        {
            "prompt": said(("user", "q")),
            "completion": said(("assistant", "good")),
            "label": True,
        },
        True,
    ),
]


@pytest.mark.parametrize(("row", "desirable"), KTO)
def test_a_label_says_whether_an_answer_is_desirable(
    jsonl: Jsonl, row: dict[str, Any], desirable: bool
) -> None:
    path = jsonl(row)

    assert only(path).messages == (USER, ANSWER)
    assert only(path).desirable is desirable
    assert read([path]).files[0].shape == "kto"


def test_a_label_that_is_a_class_makes_no_kto_row(jsonl: Jsonl) -> None:
    path = jsonl({"query": "q", "response": "good", "label": "sport"})

    assert only(path).desirable is None


@pytest.mark.parametrize("row", [{"text": "words", "id": 1}, {"response": "words"}])
def test_plain_text_is_kept_as_it_is(jsonl: Jsonl, row: dict[str, Any]) -> None:
    assert only(jsonl(row)).text == "words"
    assert only(jsonl(row)).messages == ()


def test_earlier_answers_of_a_conversational_prompt_carry_no_loss(jsonl: Jsonl) -> None:
    row = only(
        jsonl(
            {
                "prompt": said(("user", "q"), ("assistant", "a"), ("user", "r")),
                "completion": said(("assistant", "good")),
            }
        )
    )

    assert [message.loss for message in row.messages] == [None, False, None, None]


def test_columns_say_what_names_do_not(jsonl: Jsonl) -> None:
    row = {"question": "x", "prompt": "q", "reply": "good"}

    assert only(jsonl(row), "prompt=prompt", "reply=response").messages == (USER, ANSWER)
    assert only(jsonl(row), '{"prompt": "query", "reply": "response"}').messages[1] == ANSWER


def test_a_text_beside_its_class_is_learned_as_the_user_says(
    jsonl: Jsonl, refuses: Refuses
) -> None:
    path = jsonl({"text": "q", "category": "good"})

    assert only(path, "text=prompt", "category=response").messages == (USER, ANSWER)
    assert only(path, "text=text").text == "q"
    refuses(lambda: read([path]), "'text' stands beside 'category'", "category=response")


def test_columns_that_are_wrong_are_named(jsonl: Jsonl, refuses: Refuses) -> None:
    path = jsonl({"ask": "q", "reply": "a"})

    def reading(*columns: str) -> Callable[[], object]:
        return lambda: read([path], Reading(columns=columns))

    refuses(reading("ask"), "COLUMN=ROLE", "'ask'")
    refuses(reading("ask=promt"), "'promt' is no role", "Did you mean prompt")
    refuses(reading("ask=prompt", "reply=query"), "two columns to 'prompt'")
    refuses(reading("asks=prompt"), "--columns names 'asks', which it does not have")


def test_reasoning_of_its_own_column_joins_the_answer(jsonl: Jsonl) -> None:
    row = only(jsonl({"query": "q", "response": "good", "thinking": "hm"}))

    assert row.messages[1].reasoning == "hm"


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [turn("user", SECRET), *turns], **more}


GOOD_CHAT = chat(turn("assistant", "a"))
DEEP: Any = SECRET
for _ in range(100):
    DEEP = [DEEP]
BAD: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    (GOOD_CHAT, {"query": SECRET, "response": "a"}, ("row 2", "'messages'", "another shape")),
    (
        GOOD_CHAT,
        chat(turn("assistant", "a"), turn("assistant", SECRET)),
        ("row 2, message 3", "two assistant turns", "Join them"),
    ),
    (GOOD_CHAT, chat(turn("assistant", None)), ("message 2", "'content'", "null")),
    (
        GOOD_CHAT,
        chat(turn("assistant", "a", weight=-1)),
        ("message 2", "'weight'", "between 0 and"),
    ),
    (GOOD_CHAT, chat(turn("assistant", "a", weight=10**400)), ("'weight'", "between 0 and")),
    (GOOD_CHAT, chat(turn("assistant", "a", weight=SECRET)), ("'weight'", "a number")),
    (GOOD_CHAT, chat(turn("assistant", "a", weight=float("nan"))), ("'weight'", "between")),
    (GOOD_CHAT, chat(turn("user", "q", weight=1), turn("assistant", "a")), ("'weight'", "'user'")),
    (
        GOOD_CHAT,
        chat(turn("assistant", "a"), turn("user", "q", thinking=SECRET)),
        ("'thinking'", "'user'"),
    ),
    (
        GOOD_CHAT,
        chat(turn("user", [{"type": "image_url", "image_url": {"url": f"https://{SECRET}"}}])),
        ("'content' of type 'image_url'", "fetches nothing"),
    ),
    (GOOD_CHAT, chat(turn("assistant", "a"), images=[SECRET]), ("image 1", "no file")),
    (
        GOOD_CHAT,
        chat(turn("assistant", "a"), images=["https://x/y.png"]),
        ("'images'", "fetches nothing"),
    ),
    (GOOD_CHAT, chat(turn("assistant", [[[SECRET]]])), ("'content'", "a list of {type, text}")),
    (GOOD_CHAT, chat(turn("assistant", "a\0")), ("'content'", "NUL")),
    (GOOD_CHAT, chat(turn("tool", SECRET), turn("assistant", "a")), ("tool's result", "call")),
    (
        GOOD_CHAT,
        chat(turn("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])),
        ("'arguments'", "must be JSON text"),
    ),
    (
        GOOD_CHAT,
        chat(turn("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": [1]}}])),
        ("'arguments'", "must be an object"),
    ),
    (
        GOOD_CHAT,
        chat(turn("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": DEEP}}])),
        ("'arguments'", "nested deeper"),
    ),
    (
        GOOD_CHAT,
        chat(turn("user", "q", tool_calls=[CALL]), turn("assistant", "a")),
        ("'tool_calls'", "only the assistant"),
    ),
    (GOOD_CHAT, chat(turn("assistant", "a"), tools=SECRET), ("'tools'", "JSON text")),
    (
        GOOD_CHAT,
        chat(turn("assistant", "a"), system=SECRET) | {"messages": said(("system", "s"))},
        ("'system'", "begins with one"),
    ),
    (
        GOOD_CHAT,
        chat(
            turn("assistant", None, tool_calls=[{"id": "a", **CALL}]),
            turn("tool", SECRET, tool_call_id="b"),
            turn("assistant", None, tool_calls=[{"id": "b", **CALL}]),
            turn("tool", SECRET, tool_call_id="a"),
        ),
        ("row 2, message 3", "'tool_call_id'", "one of another turn"),
    ),
    (
        GOOD_CHAT,
        chat(turn("assistant", None, tool_calls=[{"id": "a", **CALL}] * 2)),
        ("one 'id'", "Tell them apart"),
    ),
    (
        {"conversations": shared(("human", "q"), ("gpt", "a"))},
        {"conversations": shared((SECRET, "q"))},
        ("message 1", "'from'", "human, gpt"),
    ),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": SECRET, "rejected": SECRET},
        ("row 2", "are the same"),
    ),
    (
        {"chosen": said(("user", "q"), ("assistant", "a")), "rejected": "b"},
        {"chosen": said(("user", "q"), ("assistant", "a")), "rejected": SECRET},
        ("row 1", "'rejected'", "the prompt before it is missing"),
    ),
    (
        PREFERENCES[4],
        {
            "chosen": said(("user", SECRET), ("assistant", "a")),
            "rejected": said(("user", "q"), ("assistant", "b")),
        },
        ("row 2", "must begin with the same turns"),
    ),
    (KTO[0][0], KTO[0][0] | {"label": SECRET}, ("row 2", "'label'", "true or false", "other text")),
    ({"query": "q", "response": "a"}, {"query": SECRET}, ("row 2", "'response'", "'query'")),
    (
        {"query": "q", "response": "a"},
        {"query": "q", "respnse": SECRET},
        ("row 2", "'response'", "nearest there: 'respnse'"),
    ),
    ({"query": "q", "response": "a"}, {"query": SECRET, "response": ""}, ("'response'", "empty")),
    (
        {"instruction": "q", "output": "a"},
        {"instruction": SECRET, "input": 3, "output": "a"},
        ("row 2", "'input'", "a number"),
    ),
    (
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "output": "a", "history": SECRET},
        ("row 2", "'history'", "a list"),
    ),
    (
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "output": "a", "history": [[SECRET]]},
        ("row 2", "pair 1", "'history'", "two texts"),
    ),
    (
        {"query": SECRET, "response": "a", "target": "b"},
        {"query": "q", "response": "a", "target": "b"},
        ("one column with the response", "'response', 'target'"),
    ),
    ({"words": SECRET}, {"words": SECRET}, ("found 'words'", "'messages'", "query")),
    (KTO[0][0], KTO[0][0] | {"label": 2}, ("row 2", "'label'", "a number")),
    ({"text": "a"}, {"text": " "}, ("row 2", "'text'", "empty")),
    (
        {"query": "q", "response": "a"},
        {"query": "q", "response": "a", "system": SECRET, "system_prompt": "s"},
        ("row 2", "one field with the system", "'system', 'system_prompt'"),
    ),
]


@pytest.mark.parametrize(("first", "second", "needles"), BAD)
def test_a_bad_row_of_any_shape_is_named_and_never_quoted(
    jsonl: Jsonl,
    refuses: Refuses,
    first: dict[str, Any],
    second: dict[str, Any],
    needles: tuple[str, ...],
) -> None:
    path = jsonl(first, second)

    refuses(lambda: read([path]), "rows.jsonl", *needles)
