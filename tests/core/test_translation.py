"""Chinese sentences stand for English ones of the code, and whole plans and errors are said."""

from __future__ import annotations

import ast
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.reference_models import LLAMA_2_7B, LLAMA_2_13B, LLAMA_3_70B
from tests.reference_plans import planned, rows

from mst import cli, rundir
from mst.cli.doctor import check_backends, check_directory, check_host, check_packages
from mst.errors import MstError, PlanError, RunError
from mst.model.facts import ModelFacts
from mst.probe import machine_facts
from mst.registry import load
from mst.request import TrainRequest
from mst.translation import sentences, translated, translated_lines
from mst.ui.choices import allowed_options
from mst.ui.speaking import spoken

ROOT = Path(__file__).parents[2]
ZH = sentences("zh")
# Three words of English in a row; names, options and units may stand.
ENGLISH = re.compile(r"(?<![-\w/.])[a-z]{2,} [a-z]{2,} [a-z]{2,}(?![-\w/.])")


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the texts of a module, with {0}, {1} … for what is put in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            numbers = iter(range(len(node.values)))
            yield "".join(
                str(each.value) if isinstance(each, ast.Constant) else f"{{{next(numbers)}}}"
                for each in node.values
            )


def composed() -> set[str]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    file = ROOT / "core" / "mst" / "translation.zh.toml"
    return set(tomllib.loads(file.read_text(encoding="utf-8"))["composed"])


def test_every_sentence_still_stands_in_the_code() -> None:
    code = [
        *(ROOT / "core" / "mst").rglob("*.py"), *(ROOT / "plugins").rglob("*.py"),
        *(ROOT / "backends").rglob("*.py"),
    ]  # fmt: skip
    known = {text for each in code for text in texts(ast.parse(each.read_text("utf-8")))}

    # Commands put three dots behind what they are about to do.
    assert {each.removesuffix(" …") for each in ZH.keys() - composed()} - known == set()


def test_both_sentences_have_the_same_places_and_chinese_fits_its_encodings() -> None:
    places = re.compile(r"\{\d+\}")
    for english, chinese in ZH.items():
        assert set(places.findall(chinese)) == set(places.findall(english)), english
        assert chinese.encode("gbk").decode("gbk") == chinese


@pytest.mark.parametrize(
    ("model", "on", "request_"),
    [
        (LLAMA_2_7B, "rtx-3090", TrainRequest()),
        (LLAMA_2_13B, "rtx-3090", TrainRequest(memory_budget="20GiB")),
        (LLAMA_2_13B, "a100-80gb:4", TrainRequest(tuner="full")),
        (LLAMA_3_70B, "910b2:8", TrainRequest()),
        (LLAMA_2_7B, "cpu-16c-64gb", TrainRequest(max_steps=10)),
    ],
)
def test_every_reason_of_a_plan_is_said_in_chinese(
    model: ModelFacts, on: str, request_: TrainRequest
) -> None:
    made = planned(model, on, request_, rows(1024))
    said = [translated(each.why, "zh") for each in made.reasons]
    said += [translated(each, "zh") for each in made.warnings]

    assert len(said) > 5
    assert [each for each in said if ENGLISH.search(each)] == []
    assert [translated(each.why, "en") for each in made.reasons] == [
        each.why for each in made.reasons
    ]


def test_an_error_says_its_three_parts_in_chinese_and_quotes_what_it_quotes(
    tmp_path: Path,
) -> None:
    with pytest.raises(PlanError) as refused:
        planned(LLAMA_3_70B, "rtx-3090")
    lock = rundir.take_lock(tmp_path)
    with pytest.raises(RunError) as used:
        rundir.take_lock(tmp_path)
    lock.close()
    plan, run = (translated(str(each.value), "zh") for each in (refused, used))

    assert "在这里放不下" in plan
    assert "可行的办法：" in plan
    assert "36" in plan
    assert str(tmp_path) in run
    assert run.endswith("请等它结束，或换一个 --output-dir。")
    waiting = "converting a b.gguf for training, once (about 20 seconds) …"
    printed = translated_lines(f"model  a\nRunError: {used.value}\n{waiting}\n", "zh")
    told = "正在转换 a b.gguf 供训练使用，只需一次（约 20 秒）……"
    assert printed == f"model  a\nRunError: {run}\n{told}\n"


def test_what_is_not_known_stays_and_takes_no_time() -> None:
    text = "cannot write " + ": ".join("{0} of " + "x" * 9 for _ in range(20_000))
    began = time.monotonic()

    assert translated(text, "zh") == text
    assert translated("merged: in float32; 1.8 MiB", "zh") == "merged: in float32; 1.8 MiB"
    assert time.monotonic() - began < 1
    assert translated(str(MstError("{0}{x}")), "zh") == "{0}{x}"


def test_the_page_says_sentences_alone_and_leaves_what_people_wrote() -> None:
    reply = {
        "name": "one process",
        "reasons": [{"choice": "strategy", "value": "rows", "why": "one process"}],
        "not_checked": {"speed": "one process"},
        "rows": [{"prediction": "one process"}],
        "error": {"message": "too many requests at once."},
    }

    assert spoken(reply, "en") is reply
    assert spoken(reply, "zh") == {
        "name": "one process",
        "reasons": [{"choice": "strategy", "value": "rows", "why": "单个进程"}],
        "not_checked": {"speed": "单个进程"},
        "rows": [{"prediction": "one process"}],
        "error": {"message": "同时的请求太多。"},
    }


def test_the_doctor_and_the_devices_are_told_in_chinese(
    capsys: pytest.CaptureFixture[str],
) -> None:
    facts = machine_facts(load())
    checks = [
        *check_packages(), *check_backends(facts), *check_host(facts, {"OMP_NUM_THREADS": "99"}),
        check_directory("working directory", ROOT, needed=True),
    ]  # fmt: skip
    said = [translated(text, "zh") for each in checks for text in (each.found, each.advice)]
    # A figure's source is cited as it is.
    sentences_left = [each for each in said if ENGLISH.search(re.sub(r"\(probe: .*?\)", "", each))]

    assert sentences_left == []
    assert "在工作进程中会被替换" in "".join(said)
    assert cli.main(["devices", "--lang", "zh"]) == 0
    told = capsys.readouterr().out
    assert "空闲 GiB" in told
    assert "cuda: 没有找到: 没有英伟达显卡" in told or "cuda:0" in told
    assert cli.main(["devices"]) == 0
    assert "GiB free" in capsys.readouterr().out


def test_every_option_of_the_page_explains_itself_in_chinese() -> None:
    helps = {name: each.metadata["help"] for name, each in allowed_options().items()}

    assert {name: each for name, each in helps.items() if each not in ZH} == {}
