"""The rows that are judged are the very rows that training held out, or an error says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mst import rundir
from mst.data.prepare import prepare
from mst.data.rows import Message, Row
from mst.errors import EvaluationError, UsageError
from mst.evaluate.choice import check_names, chosen_metrics
from mst.evaluate.held_out import of_files, of_run, question, spread
from mst.request import TrainRequest


@pytest.fixture
def own_run(finished_run: Path, chat_rows: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the finished run whose data file is a copy too."""
    run, data = tmp_path / "run", tmp_path / "rows.jsonl"
    shutil.copytree(finished_run, run)
    shutil.copy(chat_rows, data)
    for name in (rundir.MANIFEST, rundir.REQUEST):
        text = (run / name).read_text(encoding="utf-8")
        (run / name).write_text(text.replace(str(chat_rows), str(data)), encoding="utf-8")
    return run, data


def test_a_runs_held_out_rows_are_those_of_its_training(
    finished_run: Path, tiny_model: Path, chat_rows: Path
) -> None:
    request = rundir.read_document(TrainRequest, finished_run, rundir.REQUEST)
    trained = prepare(request, [str(chat_rows)], tiny_model, None)
    found = of_run(finished_run)

    assert found.rows == trained.val_rows
    assert found.answers == trained.answers == ("card", "cash", "fee", "loan")
    assert len(found.rows) == 8


def test_rows_that_have_changed_since_are_refused(own_run: tuple[Path, Path]) -> None:
    run, data = own_run
    assert len(of_run(run).rows) == 8
    data.write_text(data.read_text("utf-8").replace("too high", "too late"), "utf-8")
    with pytest.raises(EvaluationError, match="its SHA-256 differs") as caught:
        of_run(run)

    assert "too late" not in str(caught.value)
    data.unlink()
    with pytest.raises(EvaluationError, match=r"rows.jsonl, which is gone"):
        of_run(run)


def test_a_run_that_held_nothing_out_says_so(own_run: tuple[Path, Path]) -> None:
    run, _ = own_run
    request = json.loads((run / rundir.REQUEST).read_text("utf-8"))
    (run / rundir.REQUEST).write_text(json.dumps(request | {"val_size": 0.0}), "utf-8")
    with pytest.raises(EvaluationError, match=r"--val-size 0.*--dataset FILE"):
        of_run(run)


def test_all_rows_of_files_are_judged(chat_rows: Path) -> None:
    assert len(of_files([str(chat_rows), str(chat_rows)]).rows) == 80


def test_the_last_answer_is_the_reference() -> None:
    talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    row = Row(tuple(Message(*each) for each in talk), "memory", 1)
    cut = question(row)

    assert cut is not None
    assert [each.content for each in cut.messages] == ["a", "b", "c", "d"]
    assert question(Row((), "memory", 1, text="plain")) is None
    assert question(Row((Message("assistant", "b"),), "memory", 1)) is None
    assert question(Row((Message("user", "a"), Message("assistant", " ")), "memory", 1)) is None


def test_a_limit_spreads_over_all_rows() -> None:
    assert spread(range(10, 20), None) == tuple(range(10, 20))
    assert spread(range(10, 20), 5) == (10, 12, 14, 16, 18)
    assert spread(range(3), 5) == (0, 1, 2)


def test_auto_suits_the_rows() -> None:
    def auto(references: int, answers: int | None) -> tuple[str, ...]:
        return chosen_metrics(("auto",), references, answers, own=False)[0]

    assert auto(40, 4) == ("loss", "labels")
    assert auto(40, None) == ("loss", "exact_match", "rouge", "bleu", "chrf")
    assert auto(4000, None) == ("loss",)
    assert auto(0, None) == ("loss",)
    assert chosen_metrics(("json",), 40, 4, own=False)[0] == ("json",)
    assert chosen_metrics(("auto", "json"), 40, 4, own=False)[0] == ("loss", "json", "labels")


def test_a_metric_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--metric rogue is not one of .* Did you mean rouge"):
        check_names(["loss", "rogue"])


def test_a_metric_without_its_library_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"rouge_score.*pip install 'mst-train\[eval\]'"):
        check_names(["rouge"])
    found, notes = chosen_metrics(("auto",), 40, None, own=False)

    assert found == ("loss", "exact_match")
    assert "mst-train[eval]" in notes[0]


def test_what_rows_cannot_give_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no row ends with an assistant's answer"):
        chosen_metrics(("loss", "bleu"), 0, None, own=False)
    with pytest.raises(EvaluationError, match="no row ends with an assistant's answer"):
        chosen_metrics(("auto",), 0, None, own=True)
    with pytest.raises(EvaluationError, match="labels needs a classification"):
        chosen_metrics(("labels",), 40, None, own=False)
