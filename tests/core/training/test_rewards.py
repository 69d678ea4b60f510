"""Rewards: rules that agree with `mst eval`, and files whose failures are told without a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from mst.data.rows import Message, Row
from mst.errors import MstError, TrainingError, UsageError
from mst.request import TrainRequest
from mst.training.objectives.grpo import judge
from mst.training.rewards import absolute_specs, find_rewards

ROWS = [
    Row((Message("user", "SECRET?"), Message("assistant", '{"a": 1}')), "rows.jsonl", number)
    for number in (1, 2, 3)
]
ANSWERS = ['{"a": 1}', '{"A":\n1}', "no SECRET"]


def write(directory: Path, text: str) -> str:
    path = directory / "judge.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_rules_judge_each_answer() -> None:
    found = find_rewards(
        TrainRequest(
            task="grpo",
            reward_funcs=("exact_match", "json_valid"),
            reward_weights=("2", "-0.5"),
        )
    )

    assert [(each.name, each.weight) for each in found] == [
        ("exact_match", 2.0), ("json_valid", -0.5),
    ]  # fmt: skip
    assert judge(found, ROWS, ANSWERS) == [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)]


def test_a_function_sees_turns_answers_and_references(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        "def ends(prompts, completions, references):\n"
        "    assert prompts[0] == [{'role': 'user', 'content': 'SECRET?'}]\n"
        "    return [float(a[-1] == b[-1]) for a, b in zip(completions, references)]\n",
    )
    found = find_rewards(TrainRequest(task="grpo", reward_funcs=(f"{spec}:ends",)))

    assert found[0].name == "ends"
    assert judge(found, ROWS, ANSWERS) == [(1.0,), (1.0,), (0.0,)]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError(completions[0])", "raised ValueError in line 2"),
        ("return completions", "list of 3 with str in it"),
        ("return [1.0]", "list of 1 with number in it"),
        ("return [1.0, float('nan'), 0.0]", "3 finite numbers"),
        ("return [1.0, None, 0.0]", "NoneType in it"),
        ("return 1.0", "float"),
    ],
)
def test_a_failing_function_stops_the_run_without_quoting_a_row(
    body: str, words: str, tmp_path: Path
) -> None:
    spec = write(tmp_path, f"def reward(prompts, completions, references):\n    {body}\n")
    found = find_rewards(TrainRequest(task="grpo", reward_funcs=(spec,)))
    with pytest.raises(TrainingError, match=words) as caught:
        judge(found, ROWS, ANSWERS)

    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def reward(:\n", "SyntaxError in line 1"),
        ("def score(p, c, r): return 1\n", r"no function reward \(found: score\)"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--reward-funcs .*{words}"):
        find_rewards(TrainRequest(task="grpo", reward_funcs=(write(tmp_path, text),)))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(MstError, match="No such file"):
        find_rewards(TrainRequest(task="grpo", reward_funcs=("none.py",)))


def test_a_run_remembers_where_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert absolute_specs(("exact_match", "judge.py", "judge.py:ends")) == (
        "exact_match", f"{tmp_path}/judge.py", f"{tmp_path}/judge.py:ends",
    )  # fmt: skip


def test_the_documented_reward_runs(tmp_path: Path) -> None:
    document = (Path(__file__).resolve().parents[3] / "docs/objectives.md").read_text("utf-8")
    block = document.split("<!-- reward:begin -->\n```python\n")[1].split("```")[0]
    spec = f"{write(tmp_path, block)}:short"
    found = find_rewards(TrainRequest(task="grpo", reward_funcs=(spec,)))

    judged = judge(found, ROWS, ['so {"a": 1} it is', "no", "x " * 50])

    assert [each for (each,) in judged] == pytest.approx([0.95, -0.01, -0.5])
