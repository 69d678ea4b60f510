"""`mst grpo` from files to a result, over processes, and what its plan counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.core.test_objective_commands import trained

from mst.cli import main
from mst.rundir import read_manifest

LETTERS = """
def letters(prompts, completions, references):
    return [sum(map(str.isascii, each)) / max(1, len(each)) for each in completions]
"""
FLAGS = {"num_generations": 4, "max_completion_length": 8}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"question {number}", "response": "SECRET"} for number in range(17)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def letters(tmp_path: Path) -> str:
    path = tmp_path / "judges.py"
    path.write_text(LETTERS, encoding="utf-8")
    return f"{path}:letters"


@pytest.mark.slow
def test_two_processes_sample_what_one_does(
    tiny_model: Path, questions: Path, letters: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**FLAGS, "reward_funcs": letters, "beta": 0.1}
    alone = trained("grpo", tiny_model, questions, tmp_path / "one", **options)
    both = trained(
        "grpo", tiny_model, questions, tmp_path / "two", nproc_per_node=2,
        per_device_train_batch_size=1, **options,
    )  # fmt: skip
    results = read_manifest(tmp_path / "two").results

    kept = ("grad_norm", "reward", "reward_std", "completion_length", "kl", "eval_reward", "tokens")
    assert len(alone) == len(both) == 4
    for one, other in zip(alone, both, strict=True):
        told = {name: one[name] for name in kept if name in one}
        assert told == pytest.approx({name: other[name] for name in told}, rel=1e-3, abs=1e-5)
    assert {"reward", "kl"} < set(alone[0])
    assert results["best_eval_reward"] == both[-1]["eval_reward"]


def test_the_plan_counts_what_is_sampled(
    tiny_model: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lora(*more: str) -> dict[str, Any]:
        where = ["--dataset", str(questions), "--model", str(tiny_model), "--json"]
        batch = ["--per-device-train-batch-size", "1", "--on", "rtx-3090", "--tuner", "lora"]
        rule = ["--reward-funcs", "exact_match", "--num-generations", "4"]
        assert main(["plan", "--task", "grpo", *where, *batch, *rule, *more]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["plan"]["alternatives"][0]
        return found

    short = lora("--max-completion-length", "16")
    long = lora("--max-completion-length", "128")
    many = lora("--max-completion-length", "16", "--num-generations", "32")
    compared = lora("--max-completion-length", "16", "--beta", "0.1")

    assert short["configuration"]["sequences"] == 4
    assert short["configuration"]["samples"] == 16
    assert long["step_seconds"] > 4 * short["step_seconds"]
    assert min(long["peak_bytes"], many["peak_bytes"]) > short["peak_bytes"]
    assert compared["step_seconds"] > short["step_seconds"]


def test_zero_and_a_failing_reward_are_refused_before_training(
    tiny_model: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--dataset", str(questions), "--model", str(tiny_model), "--on", "rtx-3090"]
    plan = ["plan", "--task", "grpo", *where, "--reward-funcs"]
    code = main([*plan, "exact_match", "--deepspeed", "zero3"])
    told = capsys.readouterr().err
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n", encoding="utf-8")
    other = main([*plan, str(broken)])

    assert code == 1
    assert "samples answers from a model that each device holds whole" in " ".join(told.split())
    assert other == 2
    assert "ModuleNotFoundError in line 1" in capsys.readouterr().err


def test_answers_that_cannot_fit_behind_their_prompts_are_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": word * 40, "response": "yes"} for word in ("card ", "a longer question ")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"model": tiny_model, "dataset": path, "val-size": 0, "max-completion-length": 400}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    code = main(["plan", "--task", "grpo", "--reward-funcs", "exact_match", *flags])
    said = " ".join(capsys.readouterr().err.split())

    assert code == 1
    assert "1 of 2 rows get longer than the 512 tokens that the model reads" in said
    assert "a longer question" not in said
    fits = said.partition("Pass --max-completion-length ")[2].partition(",")[0]
    options["max-completion-length"] = int(fits)
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main(["plan", "--task", "grpo", "--reward-funcs", "exact_match", *flags]) == 0
