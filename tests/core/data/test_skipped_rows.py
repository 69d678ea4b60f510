"""Rows that a template or a task refuses: errors by default, with skip counted in every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mst import cli, rundir
from mst.data.prepare import Prepared, prepare
from mst.errors import DataError
from mst.evaluate.held_out import of_run
from mst.request import TrainRequest

Refuses = Callable[..., str]
Jsonl = Callable[..., str]

SECRET = "Frau Müller 王小明 +49-151"
# As templates of real models do: it takes some conversations, and refuses others in its own words.
TEMPLATE = (
    "{% for m in messages %}{% if 'Müller' in m.content %}{{ raise_exception('not this: ' +"
    " m.content) }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pair(question: str, answer: str) -> dict[str, Any]:
    return {"query": question, "response": answer}


GOOD = [pair(f"question {number}", f"answer {number}") for number in range(30)]
BAD = [pair(SECRET, "hm"), pair("again " + SECRET, "hm")]
ROWS = [*GOOD[:10], BAD[0], *GOOD[10:], BAD[1]]


@pytest.fixture
def request_of(tmp_path: Path, jsonl: Jsonl, tiny_model: Path) -> TrainRequest:
    template = tmp_path / "strict.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    return TrainRequest(
        model=str(tiny_model),
        dataset=(jsonl(*ROWS),),
        template=str(template),
        device="cpu",
        val_size=8,
    )


def prepared(request: TrainRequest) -> Prepared:
    return prepare(request, request.dataset, Path(str(request.model)), None)


def test_a_row_that_the_template_refuses_is_an_error(
    request_of: TrainRequest, refuses: Refuses
) -> None:
    refuses(lambda: prepared(request_of), "rows.jsonl, row ", "strict.jinja")


def test_skipping_leaves_out_what_the_template_refuses_and_says_so(
    request_of: TrainRequest,
) -> None:
    found = prepared(replace(request_of, on_bad_row="skip"))
    assert found.val is not None
    kept = len(found.train.examples) + len(found.val.examples)
    (facts,) = found.files

    assert (kept, facts.rows) == (30, 30)
    assert len(facts.skipped) == 1
    assert "strict.jinja" in facts.skipped[0]
    assert "2 (row 11, 32)" in facts.skipped[0]
    assert "Müller" not in facts.skipped[0]


def test_rows_keep_their_side_of_the_split_when_others_are_skipped(
    request_of: TrainRequest, jsonl: Jsonl
) -> None:
    skipping = replace(request_of, on_bad_row="skip")
    found = prepared(skipping)
    harmless = [pair("q", "a") if row in BAD else row for row in ROWS]
    whole = prepared(replace(request_of, dataset=(jsonl(*harmless, name="harmless.jsonl"),)))
    left = {row.number for row in whole.val_rows} - {11, 32}

    assert {each.row.number for each in found.val.examples} == left  # type: ignore[union-attr]


def test_rows_of_which_none_is_left_are_an_error(
    request_of: TrainRequest, jsonl: Jsonl, refuses: Refuses
) -> None:
    only_bad = replace(
        request_of, dataset=(jsonl(*BAD, name="b.jsonl"),), on_bad_row="skip", val_size=0
    )

    refuses(lambda: prepared(only_bad), "none of the rows can be used", "b.jsonl, row 2")


def test_rows_that_the_task_cannot_use_are_skipped(
    jsonl: Jsonl, tiny_model: Path, refuses: Refuses
) -> None:
    pairs = [
        {"prompt": f"q{number}", "chosen": f"good {number}", "rejected": f"bad {number}"}
        for number in range(6)
    ]
    mixed = (jsonl(*pairs, name="pairs.jsonl"), jsonl(*GOOD[:3], name="plain.jsonl"))
    request = TrainRequest(
        model=str(tiny_model), dataset=mixed, task="dpo", device="cpu", val_size=0
    )
    refuses(lambda: prepared(request), "plain.jsonl, row 1", "--task dpo")
    found = prepared(replace(request, on_bad_row="skip"))

    assert len(found.train.examples) == 6
    assert [each.rows for each in found.files] == [6, 0]
    assert "3 (row 1, 2, 3)" in found.files[1].skipped[0]


def test_training_evaluation_and_the_check_agree_on_the_rows(
    request_of: TrainRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = {
        "model": request_of.model, "dataset": request_of.dataset[0],
        "template": request_of.template,
        "output-dir": run, "device": "cpu", "max-steps": 1, "val-size": 16, "threads": 1,
        "per-device-train-batch-size": 4, "on-bad-row": "skip",
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert cli.main(["train", *flags]) == 0
    manifest = rundir.read_manifest(run)
    held = of_run(run)
    trained = prepared(rundir.read_document(TrainRequest, run, rundir.REQUEST))
    assert trained.val is not None
    capsys.readouterr()
    assert cli.main(["eval", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    code = cli.main(
        ["data", "check", request_of.dataset[0], "--model", str(request_of.model), "--template",
         str(request_of.template), "--json"]
    )  # fmt: skip
    (checked,) = json.loads(capsys.readouterr().out)["files"]

    assert manifest.data[0].rows == checked["rows"] == 30
    assert sum(each["rows"] for each in checked["refused"]) == 2
    assert code == 1
    assert held.on_bad_row == "skip"
    assert told["rows"] == len(trained.val.examples)


def test_streaming_skips_them_too(request_of: TrainRequest) -> None:
    streaming = replace(request_of, streaming=True, val_size=0)
    with pytest.raises(DataError, match=r"strict\.jinja"):
        prepared(streaming)
    found = prepared(replace(streaming, on_bad_row="skip")).train.examples
    tokens = [len(example.input_ids) for example in found]

    assert sum(count > 0 for count in tokens) == 30
    ((reason, rows),) = found.left_out().items()  # type: ignore[attr-defined]
    assert rows == 2
    assert "strict.jinja" in reason
    assert "Müller" not in reason
