"""A user's metric is run as it stands, and its failures are told without a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from mst.errors import EvaluationError
from mst.evaluate.figures import figure
from mst.evaluate.user_metric import load_metric, user_statistic

SAID, MEANT = ["SECRET one", "two"], ["SECRET one", "three"]


def write(directory: Path, text: str) -> Path:
    path = directory / "mine.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_list_has_an_interval_and_a_number_has_none(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "def metric(predictions, references):\n"
        "    return [a == b for a, b in zip(predictions, references)]\n"
        "def total(predictions, references):\n"
        "    return sum(map(len, predictions))\n",
    )
    rows = figure(user_statistic(load_metric(str(path)), SAID, MEANT))
    whole = figure(user_statistic(load_metric(f"{path}:total"), SAID, MEANT))

    assert (rows.name, rows.value) == ("metric", 0.5)
    assert rows.interval is not None
    assert (whole.name, whole.value, whole.interval) == ("total", 13.0, None)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "import numpy\ndef metric(predictions, references):\n    return numpy.ones(2) / 4\n",
    )

    assert figure(user_statistic(load_metric(str(path)), SAID, MEANT)).value == 0.25


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    raise ValueError(predictions[0])", "raised ValueError in line 2"),
        ("    return predictions[9]", "raised IndexError in line 2"),
        ("    return predictions[0]", "returned str"),
        ("    return predictions", "list of 2 with str in it"),
        ("    return [1.0]", "list of 1 with number in it"),
        ("    return float('nan')", "float, which is no finite number"),
        ("    return None", "returned NoneType"),
    ],
)
def test_a_failing_metric_is_told_by_type_and_line_alone(
    body: str, words: str, tmp_path: Path
) -> None:
    path = write(tmp_path, f"def metric(predictions, references):\n{body}\n")
    with pytest.raises(EvaluationError, match=words) as caught:
        user_statistic(load_metric(str(path)), SAID, MEANT)

    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def metric(:\n", "SyntaxError in line 1"),
        ("x = 1\nimport no_such_module\n", "ModuleNotFoundError in line 2"),
        ("def score(predictions, references): return 1\n", r"no function metric \(found: score\)"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=words):
        load_metric(str(write(tmp_path, text)))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="No such file"):
        load_metric(str(tmp_path / "none.py"))


def test_the_documented_metric_runs(tmp_path: Path) -> None:
    document = (Path(__file__).resolve().parents[3] / "docs/evaluation.md").read_text("utf-8")
    block = document.split("<!-- metric:begin -->\n```python\n")[1].split("```")[0]
    metric = load_metric(str(write(tmp_path, block)))

    assert figure(user_statistic(metric, ["one two", "three"], ["one two", "four"])).value == 0.5
