"""Which tokens carry loss, shown to a person on a terminal and to nobody else."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pexpect
import pytest

from mst.cli import main
from mst.data.encode import IGNORE, Example, encode
from mst.data.preview import pieces
from mst.data.rows import Message, Row
from mst.data.template import load_template
from mst.data.tokens import load_tokenizer

SECRET = "patient 4711 has gout"


def talk(answer: str, **more: object) -> dict[str, object]:
    turns = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": answer, **more}]
    return {"messages": turns}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    found = [talk("take\x1b[31m rest 好"), talk("half", weight=0.5), talk("none", loss=False)]
    path.write_text("".join(json.dumps(each) + "\n" for each in found), encoding="utf-8")
    return path


def on_terminal(*arguments: str, **environment: str) -> str:
    import os

    child = pexpect.spawn(
        sys.executable, ["-m", "mst", "preview", *arguments],
        env={**os.environ, "COLUMNS": "200", **environment}, dimensions=(50, 200),
        encoding="utf-8", timeout=60,
    )  # fmt: skip
    child.expect(pexpect.EOF)
    child.close()
    text: str = child.before or ""
    return text


def test_answers_are_marked_with_and_without_colour(tiny_model: Path, rows: Path) -> None:
    flags = ["--model", str(tiny_model), "--dataset", str(rows), "--rows", "2"]
    plain = on_terminal(*flags, NO_COLOR="1", TERM="dumb")
    marked = re.findall(r"⟦(.*?)⟧", plain, re.DOTALL)

    assert [each.split("<|im_end|>")[0] for each in marked] == [
        "take\\x1b[31m rest 好",
        "×0.5 half",
    ]
    assert all(SECRET not in each for each in marked)
    assert SECRET in plain
    assert "\x1b[3" in on_terminal(*flags, TERM="xterm-256color")


def test_a_row_that_training_refuses_says_why(tiny_model: Path, rows: Path) -> None:
    flags = ["--model", str(tiny_model), "--dataset", str(rows)]
    shown = on_terminal(*flags, "--first", "3", NO_COLOR="1")

    assert "row 3" in shown
    assert "refused:" in shown
    assert "no turn carries loss" in shown


def test_without_a_terminal_no_text_is_shown(
    tiny_model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["preview", "--model", str(tiny_model), "--dataset", str(rows), "--rows", "2"]
    refused = main(flags)
    said = capsys.readouterr()
    numbers = main([*flags, "--no-text"])
    printed = capsys.readouterr()

    assert (refused, numbers) == (2, 0)
    assert "--no-text" in said.err
    assert re.search(r"\d+ tokens, \d+ with loss", printed.out)
    for text in (said.out, said.err, printed.out, printed.err):
        assert SECRET not in text
        assert "rest" not in text


def test_a_row_that_the_task_cannot_use_says_what_it_lacks(
    tiny_model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["preview", "--model", str(tiny_model), "--dataset", str(rows), "--rows", "1"]
    code = main([*flags, "--no-text", "--task", "dpo"])

    assert code == 1
    assert "refused: for --task dpo, the row" in capsys.readouterr().out


def test_there_is_no_such_row(
    tiny_model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_model), "--dataset", str(rows), "--no-text"]
    code = main(["preview", *flags, "--first", "9"])

    assert code == 2
    assert "there are only 3 rows" in capsys.readouterr().err


def test_pieces_hold_every_token_once_with_its_loss(tiny_model: Path) -> None:
    messages = (Message("user", "多少？ 😀"), Message("assistant", "三个 😀 ok"))
    tokenizer = load_tokenizer(tiny_model)
    row = Row(messages, "memory", 1)
    (example,) = encode([row], tokenizer, load_template(tiny_model), None).examples
    found = list(pieces(example, tokenizer))
    learned = {token for each in found if each.weight for token in each.ids}

    assert [token for each in found for token in each.ids] == list(example.input_ids)
    assert "".join(each.text for each in found if each.weight).startswith("三个 😀 ok")
    assert {label for label in example.labels if label != IGNORE} <= learned


def test_the_spaces_between_words_are_shown_for_every_kind_of_decoder() -> None:
    from array import array

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from mst.data.tokens import TextTokenizer

    words = {"</s>": 0, "\u2581Hello": 1, "\u2581big": 2, "\u2581world": 3}
    made = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    ids = array("i", made.encode("Hello big world").ids)
    example = Example(ids, ids[:], Row((), "memory", 1, text="Hello big world"))
    found = pieces(example, TextTokenizer(made, (0,), 0, 4))

    assert "".join(each.text for each in found) == "Hello big world"


def test_both_answers_of_a_preference_are_shown(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "which card?", "chosen": "the red one", "rejected": "none, go away"}
    path.write_text(json.dumps(pair) + "\n", encoding="utf-8")
    flags = ["preview", "--task", "dpo", "--model", str(tiny_model), "--dataset", str(path)]
    code = main([*flags, "--no-text"])
    better, worse = (line for line in capsys.readouterr().out.splitlines() if "tokens, " in line)

    assert code == 0
    assert worse.startswith("rejected: ")
    assert not better.startswith("rejected")
    assert better.split()[0] != worse.split()[1]  # the answers differ in length
    assert all(int(line.split()[-3]) > 0 for line in (better, worse))
