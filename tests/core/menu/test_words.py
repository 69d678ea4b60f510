"""Both languages say the same, each screen fits its terminal, and options explain themselves."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from mst.menu import words as catalogue
from mst.menu.draft import GOALS, Draft, arguments, goal_of, reachable
from mst.menu.goal_step import SETTINGS
from mst.menu.screen import cells, next_page, say, shortened, show_command, visible, wrapped
from mst.menu.words import ascii_alone, words_of
from mst.request import fields
from mst.translation import language_of

EN, ZH = words_of("en"), words_of("zh")
CODE = Path(catalogue.__file__).parent


def places(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_both_languages_have_every_text_with_the_same_values() -> None:
    assert ZH.texts.keys() == EN.texts.keys()
    for key in ZH.texts:
        assert places(ZH.texts[key]) == places(EN.texts[key]), key
        assert ZH.texts[key].strip()


def test_english_is_ascii() -> None:
    assert all(each.isascii() for each in EN.texts.values())


def test_no_text_has_what_a_terminal_is_spared() -> None:
    for text in (*EN.texts.values(), *ZH.texts.values()):
        assert visible(text) == text


def test_chinese_fits_every_chinese_encoding() -> None:
    for text in ZH.texts.values():
        assert text.encode("gbk").decode("gbk") == text


def test_every_text_is_used_and_every_used_one_is_there() -> None:
    code = "".join(each.read_text() for each in sorted(CODE.glob("*.py")))
    literals = re.findall(r'"([a-z]+)\.([a-z_]+)"', code)
    known = {key.partition(".")[0] for key in EN.texts}
    named = {f"{table}.{key}" for table, key in literals if table in known and key != "json"}
    tables = set(re.findall(r'f"([a-z]+)\.\{', code))

    assert named <= EN.texts.keys()
    unused = {key for key in EN.texts if key not in named and key.partition(".")[0] not in tables}
    assert unused == set()


@pytest.mark.parametrize("words", [EN, ZH])
def test_each_setting_is_an_option_explained_on_one_line_of_80_columns(
    words: catalogue.Words,
) -> None:
    named = {key for key in words.texts if key.startswith("options.")}

    assert named == {f"options.{name}" for name in SETTINGS}
    assert set(SETTINGS) <= set(fields())
    # What is before it in the list: a mark and a number, the name and the value.
    assert [key for key in named if cells(words.texts[key]) > 79 - 12 - 24] == []


@pytest.mark.parametrize(
    ("asked", "environ", "encoding", "language"),
    [
        ("auto", {"LANG": "zh_CN.UTF-8"}, "utf-8", "zh"),
        ("auto", {"LANG": "en_US.UTF-8"}, "utf-8", "en"),
        ("auto", {"LANG": "zh_CN.UTF-8", "LC_ALL": "de_DE.UTF-8"}, "utf-8", "en"),
        ("auto", {"LANG": "zh_CN.GBK"}, "gbk", "zh"),
        ("auto", {"LANG": "zh_CN"}, "ascii", "en"),
        ("auto", {}, "utf-8", "en"),
        ("zh", {"LANG": "C"}, "utf-8", "zh"),
        ("zh", {"LANG": "en_US.ISO-8859-1"}, "iso-8859-1", "en"),
        ("en", {"LANG": "zh_CN.UTF-8"}, "utf-8", "en"),
    ],
)
def test_the_language_follows_the_option_then_the_locale(
    asked: str, environ: dict[str, str], encoding: str, language: str
) -> None:
    assert language_of(asked, environ, encoding) == language


def test_ascii_is_for_terminals_that_promise_no_more() -> None:
    assert ascii_alone({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, "utf-8")
    assert ascii_alone({}, "utf-8")
    assert ascii_alone({"LANG": "zh_CN.UTF-8"}, "ascii")
    assert not ascii_alone({"LANG": "zh_CN.UTF-8"}, "utf-8")
    assert ascii_alone({"LC_ALL": "zh_CN.GBK"}, "gbk"), "GBK has Chinese, and no bullet"


@pytest.mark.parametrize("words", [EN, ZH], ids=["en", "zh"])
def test_texts_wrap_by_columns_and_lose_nothing(words: catalogue.Words) -> None:
    for text in words.texts.values():
        for columns in (79, 30):
            lines = wrapped(text, columns)

            assert all(cells(each) <= columns for each in lines), lines
            assert "".join("".join(lines).split()) == "".join(text.split())
            assert not any(each.startswith(("，", "。", "、", "）")) for each in lines)


def test_a_long_word_is_kept_whole_and_a_label_is_cut_by_columns() -> None:
    assert wrapped("see /a/very/long/path/that/has/no/spaces ok", 20) == [
        "see",
        "/a/very/long/path/that/has/no/spaces",
        "ok",
    ]
    assert shortened("微调一个模型", 9) == "微调一..."
    assert shortened("\x1b[31mred", 20) == "?[31mred"


def test_no_name_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[2Jb\ncan't be read")
    show_command(["chat", "runs/\x1b]0;x\x07"])

    assert "\x1b" not in capsys.readouterr().out


def test_every_page_of_a_list_can_be_reached_from_every_other() -> None:
    starts = [0]
    while (start := next_page(starts[-1], 6, 13)) not in starts:
        starts.append(start)

    assert starts == [0, 6, 12]
    assert start == 0
    assert next_page(6, 6, 12) == 0


@pytest.mark.parametrize(
    ("draft", "goals", "options"),
    [
        (Draft(), {"classification", "answering", "style"}, ["--label-accuracy", "on"]),
        (Draft(dataset=("a.csv",), shape="alpaca"), {"answering", "style"}, []),
        (Draft(dataset=("a.txt",), shape="text"), {"style"}, ["--task", "pt"]),
        (Draft(dataset=("a.jsonl",), shape="preference"), {"preference"}, ["--task", "dpo"]),
        (Draft(dataset=("a.jsonl",), shape="kto"), {"preference"}, ["--task", "kto"]),
        (
            Draft(dataset=("a.jsonl",), shape="messages", goal="style"),
            {"answering", "style"},
            ["--train-on", "all"],
        ),
    ],
)
def test_goals_follow_the_data_and_become_options(
    draft: Draft, goals: set[str], options: list[str]
) -> None:
    assert {each for each in GOALS if reachable(draft, each)} == goals
    assert goal_of(draft) in goals
    data = ["--dataset", *draft.dataset] if draft.dataset else []
    assert arguments(draft) == [*data, *options]


def test_a_quick_try_is_short_and_measures_no_accuracy() -> None:
    found = arguments(Draft(model="m", options={"lora_rank": "4"}), quick=True)

    assert found == [
        "--model", "m", "--lora-rank", "4", "--max-steps", "10", "--label-accuracy", "off",
    ]  # fmt: skip
