"""What an evaluation or an export has found is said in the menu's words, in both languages."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mst.background import Work
from mst.errors import EXIT_INTERRUPTED
from mst.menu.outcome import show_outcome
from mst.menu.progress import progress_of, title_of
from mst.menu.words import words_of


def work_of(place: Path, printed: str, code: int, *arguments: str) -> Work:
    directory = place / "work"
    directory.mkdir(exist_ok=True)
    (directory / "output").write_text(printed)
    state = "failed" if code else "done"
    started = "2026-11-28T03:00:00+00:00"
    return Work("work", arguments, directory, started, state, code, None, place)


def written(file: Path, **found: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"created": "2026-11-28T03:10:00+00:00", **found}))


@pytest.mark.parametrize(
    ("language", "verdict", "names"),
    [("en", "better", "right answers, in its own words"), ("zh", "更好", "正确率，自由作答")],
)
def test_an_evaluation_tells_each_figure_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], language: str, verdict: str, names: str
) -> None:
    figures = [
        {"name": "loss", "before": 3.25, "value": 1.5, "verdict": "better"},
        {"name": "label_accuracy_free", "before": 0.0, "value": 0.9458, "verdict": "better"},
        {"name": "of_my_own", "before": None, "value": 12.5, "verdict": None},
    ]
    written(tmp_path / "runs/a/eval.json", rows=240, figures=figures, notes=[])
    work = work_of(tmp_path, "metric  base", 0, "eval", "runs/a", "--compare", "base")
    show_outcome(words_of(language), work)
    printed = capsys.readouterr().out

    assert "240" in printed
    assert all(each in printed for each in ("3.25", "1.5", verdict, names, "0.0%", "94.6%"))
    assert all(each in printed for each in ("of_my_own", "12.5"))
    assert "label_accuracy" not in printed
    assert "metric" not in printed


@pytest.mark.parametrize(
    ("language", "fault"), [("en", "plain rounding"), ("zh", "直接取整反而偏离更少")]
)
def test_an_export_that_fails_its_gate_says_so_with_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], language: str, fault: str
) -> None:
    faults = [
        "plain rounding to the same scheme diverges by less: 0.1 nats against 0.2. Pass more or"
        " other --calibration rows, or --method rtn"
    ]
    model = {"tokens": 900, "perplexity_ratio": 1.5, "agreement": 0.25}
    written(
        tmp_path / "runs/a/export/gptq/manifest.json", format="gptq", status="failed",
        faults=faults, quality={"model": model, "answers": None}, not_checked={},
    )  # fmt: skip
    work = work_of(tmp_path, "", 1, "export", "runs/a", "--format", "gptq")
    show_outcome(words_of(language), work)
    printed = "".join(capsys.readouterr().out.split("\n"))

    assert fault in printed
    assert all(each in printed for each in ("1.5000", "25.00%", "900"))


def test_what_an_older_work_wrote_is_not_told_and_errors_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "runs/a/eval.json", created="2026-11-01T00:00:00+00:00", rows=240)
    error = "RunError: runs/a/run.json is damaged. Restore it from a backup, or start a new run.\n"
    show_outcome(words_of("zh"), work_of(tmp_path, error, 1, "eval", "runs/a"))
    printed = capsys.readouterr().out

    assert "240" not in printed
    assert "runs/a/run.json 已损坏。请从备份恢复，或重新训练。" in printed


def test_a_work_is_told_by_what_it_does_with_which_run(tmp_path: Path) -> None:
    works = [
        work_of(tmp_path, "", 0, *arguments)
        for arguments in (
            ("train", "--max-steps", "1", "--output-dir", "runs/a"),
            ("eval", "runs/b", "--compare", "base", "--output", "runs/b/eval.json"),
            ("export", "runs/c", "--format", "gptq"),
            ("train", "options.yaml"),
            ("models", "pull", "ORG/NAME"),
        )
    ]
    told = [title_of(words_of("zh"), each).split("  ", 2)[2] for each in works]

    assert told == [
        "训练  a", "对比  b", "导出  gptq, c", "训练  options.yaml", "models pull ORG/NAME",
    ]  # fmt: skip


def test_the_time_left_follows_the_newest_steps_and_not_what_came_before(tmp_path: Path) -> None:
    work = work_of(tmp_path, "", 0, "train", "--output-dir", "runs/a")
    run = tmp_path / "runs/a"
    run.mkdir(parents=True)
    (run / "plan.json").write_text('{"total_steps": 100}')
    os.utime(run / "plan.json", (0, 0))
    # A first step of 60 s, then 3 of 2 s.
    lines = [
        {"step": step, "loss": 2.5, "learning_rate": 1e-4, "tokens": 600 * step,
         "tokens_per_second": 10.0 if step == 1 else 300.0}
        for step in (1, 2, 3, 4)
    ]  # fmt: skip
    metrics = run / "metrics.jsonl"
    metrics.write_text(json.dumps(lines[0]) + "\n")

    assert "left" not in progress_of(words_of("en"), work, False).line

    metrics.write_text("".join(json.dumps(each) + "\n" for each in lines))

    assert progress_of(words_of("en"), work, False).line.endswith("   about 3.2 minutes left")


def test_a_work_that_was_stopped_has_not_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "Interrupted: stopped after step 9 of 75; everything is saved. Go on with: mst train"
    work = work_of(tmp_path, told, EXIT_INTERRUPTED, "train", "--output-dir", "runs/a")
    show_outcome(words_of("en"), work)

    assert capsys.readouterr().out == "It was stopped.\n"
    assert title_of(words_of("en"), work).startswith("stopped ")


def test_before_its_first_step_a_run_shows_what_is_known_in_the_language(tmp_path: Path) -> None:
    printed = "reading and tokenizing the data …\nthreads 2  needs 1 GiB without it; 9 GiB\n"
    work = work_of(tmp_path, printed, 0, "train", "--output-dir", "runs/a")

    assert progress_of(words_of("en"), work, False).line.startswith("threads")
    chinese = progress_of(words_of("zh"), work, False)
    assert (chinese.lines, chinese.line) == ((), "正在读取数据并切分词元……")
