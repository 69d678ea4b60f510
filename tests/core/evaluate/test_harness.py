"""lm-evaluation-harness runs tasks of local files in its own environment and leaves nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from mst import serial
from mst.errors import EvaluationError
from mst.evaluate.figures import figure
from mst.evaluate.harness import _statistic, run_tasks
from mst.evaluate.job import EvalJob, EvalRequest, prepare_evaluation

TASK = """\
task: wards
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def harness_python() -> str | None:
    """Return a Python that has lm_eval: this one, or what MST_TEST_HARNESS_PYTHON names."""
    return sys.executable if importlib.util.find_spec("lm_eval") else os.environ.get(
        "MST_TEST_HARNESS_PYTHON")  # fmt: skip


def job(run: Path, directory: Path, python: str) -> EvalJob:
    rows = [{"question": f"{n} + 1?", "choices": [str(n + 1), "x"], "answer": 0} for n in range(9)]
    data = directory / "wards.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in rows))
    (directory / "wards.yaml").write_text(TASK.format(data=data))
    request = EvalRequest(
        target=str(run), compare="base", harness=("wards",), tasks_dir=str(directory),
        harness_python=python, device="cpu",
    )  # fmt: skip
    return prepare_evaluation(request, os.environ)


@pytest.mark.slow
@pytest.mark.skipif(harness_python() is None, reason="needs lm_eval, here or in another Python")
def test_a_task_is_run_with_the_adapter_and_with_the_base(
    finished_run: Path, tmp_path: Path
) -> None:
    python = harness_python()
    assert python is not None
    report = run_tasks(job(finished_run, tmp_path, python), os.environ)

    assert [each.name for each in report.figures] == ["wards acc"]
    assert report.rows == report.figures[0].rows == 9
    assert report.figures[0].before is not None
    assert report.figures[0].difference_interval is not None
    assert serial.loads(type(report), serial.dumps(report)) == report
    assert not list(Path("/dev/shm").glob("mst-harness-*"))


def test_a_python_without_the_harness_is_refused(finished_run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(EvaluationError, match=r"pip install 'lm-eval\[hf\]'"):
        run_tasks(job(finished_run, tmp_path, str(bare)), os.environ)
    with pytest.raises(EvaluationError, match="can't be run: No such file"):
        run_tasks(job(finished_run, tmp_path, str(tmp_path / "none")), os.environ)


def test_a_harness_that_fails_is_told_without_its_text(finished_run: Path, tmp_path: Path) -> None:
    failing = tmp_path / "python"
    failing.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "SECRET"\necho "a.ValueError: SECRET"; exit 3\n'
    )
    failing.chmod(0o755)
    with pytest.raises(EvaluationError, match=r"ended with code 3 \(ValueError\)") as caught:
        run_tasks(job(finished_run, tmp_path, str(failing)), os.environ)

    assert "SECRET" not in str(caught.value)


def test_only_means_over_rows_are_taken_apart() -> None:
    mean = figure(_statistic("acc", 0.5, [1.0, 0.0], True))
    whole = figure(_statistic("bleu", 31.0, [1.0, 0.0], True))

    assert mean.interval == (0.0, 1.0)
    assert (whole.value, whole.interval) == (31.0, None)
