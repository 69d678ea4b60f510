"""`mst dpo`, `mst kto`, `mst rm` and a plugin's objective, from files to a result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.simulated import installed

from mst.cli import main
from mst.model.facts import read_facts
from mst.rundir import read_manifest, read_metrics
from mst.training.adapters import quiet_peft

QUESTIONS = ("lost card", "late fee", "cash", "a loan", "the rate", "a new card", "my pin", "tax")


def preference(number: int) -> dict[str, Any]:
    question = f"{QUESTIONS[number % 8]} {number}"
    return {
        "prompt": question,
        "chosen": f"we can help with {question}",
        "rejected": "no" if number % 2 else f"ask somebody else about {question}, please",
    }


def verdict(number: int) -> dict[str, Any]:
    row = preference(number)
    good = number % 3 > 0
    answer = row["chosen"] if good else row["rejected"]
    turns = ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer})
    return {"messages": turns, "label": good}


Written = Callable[[str, Sequence[dict[str, Any]]], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Return a function that writes rows into a file."""

    def write(name: str, rows: Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def trained(
    command: str, model: Path, rows: Path, run: Path, site: Path | None = None, **changes: object
) -> list[dict[str, Any]]:
    """Run a command to its end and return the lines of its metrics."""
    options = {
        "model": model, "dataset": rows, "output-dir": run, "device": "cpu", "dtype": "float32",
        "max-steps": 3, "val-size": 4, "learning-rate": 0.01, "threads": 1, "warmup-ratio": 0,
        "per-device-train-batch-size": 2, "gradient-accumulation-steps": 3,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    path = {"PYTHONPATH": str(site)} if site else {}
    done = subprocess.run(
        [sys.executable, "-m", "mst", command, *flags],
        env=os.environ | path,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    return read_metrics(run)


def test_two_processes_measure_what_one_does(
    tiny_model: Path, written: Written, tmp_path: Path
) -> None:
    # Seven rows are left over for the second step, the last micro-batch of which is one rank's.
    rows = written("verdicts.jsonl", [verdict(number) for number in range(17)])
    alone = trained("kto", tiny_model, rows, tmp_path / "one")
    both = trained(
        "kto", tiny_model, rows, tmp_path / "two", nproc_per_node=2,
        per_device_train_batch_size=1,
    )  # fmt: skip

    kept = ("loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "eval_loss")
    assert len(alone) == len(both) == 4
    for one, other in zip(alone, both, strict=True):
        told = {name: one[name] for name in kept if name in one}
        assert told == pytest.approx({name: other[name] for name in told}, rel=1e-4, abs=1e-6)
    assert "kl" in alone[0]
    assert "eval_kl" in alone[-1]


@pytest.mark.slow
def test_under_zero_the_reference_is_the_same(
    tiny_model: Path, written: Written, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    rows = written("pairs.jsonl", [preference(number) for number in range(17)])
    alone = trained("dpo", tiny_model, rows, tmp_path / "one")
    shared = trained(
        "dpo", tiny_model, rows, tmp_path / "two", nproc_per_node=2, deepspeed="zero3",
        per_device_train_batch_size=1,
    )  # fmt: skip

    for one, other in zip(alone, shared, strict=True):
        names = {"loss", "grad_norm", "rewards/margins", "eval_loss"} & set(one)
        told = {name: one[name] for name in names}
        assert told == pytest.approx({name: other[name] for name in names}, rel=1e-3, abs=1e-5)
    assert alone[-2]["rewards/margins"] > 0


@pytest.fixture(scope="module")
def reward_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that has learnt which answers are better."""
    directory = tmp_path_factory.mktemp("reward")
    rows = directory / "pairs.jsonl"
    lines = (json.dumps(preference(number)) + "\n" for number in range(24))
    rows.write_text("".join(lines), encoding="utf-8")
    trained("rm", tiny_model, rows, directory / "run", max_steps=12, learning_rate=0.003)
    return directory / "run"


def test_a_reward_model_learns_and_loads_with_transformers_and_peft(
    reward_run: Path, tiny_model: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    results = read_manifest(reward_run).results
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, pad_token_id=0, dtype=torch.float32, local_files_only=True
    )
    with quiet_peft():
        model = PeftModel.from_pretrained(base, str(reward_run / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_run / "adapter", local_files_only=True)

    def score(answer: str) -> float:
        turns = [{"role": "user", "content": "tax 7"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            return float(model(ids).logits)

    assert results["eval_rewards/accuracies"] == 1.0
    assert results["eval_rewards/margins"] > 0.5
    assert score("we can help with tax 7") > score("no") + 0.5


@pytest.mark.parametrize("command", ["chat", "merge"])
def test_a_reward_model_is_not_talked_to_or_merged(
    command: str, reward_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([command, str(reward_run)])

    assert code == 1
    assert "made a reward model" in capsys.readouterr().err


def test_a_packages_objective_trains(tiny_model: Path, written: Written, tmp_path: Path) -> None:
    site = installed("robust_dpo")
    rows = written("pairs.jsonl", [preference(number) for number in range(16)])
    lines = trained(
        "train", tiny_model, rows, tmp_path / "run", site, task="robust-dpo", label_smoothing=0.1,
        max_steps=6,
    )  # fmt: skip
    margins = [line["rewards/margins"] for line in lines if "rewards/margins" in line]

    assert len(margins) == 6
    assert margins[0] == 0.0
    assert margins[-1] > 0.02


def planned(
    task: str, rows: Path, model: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, dict[str, Any], str]:
    """Return the exit code of `mst plan --json`, what it printed and what it complained of."""
    where = ["--dataset", str(rows), "--model", str(model), "--json"]
    code = main(["plan", "--task", task, *where, *more])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if code == 0 else {}, printed.err


def test_rows_of_another_task_are_refused_by_file_and_row(
    tiny_model: Path, written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [{"prompt": "a", "response": "secret"}] * 20
    code, _, told = planned("dpo", written("chat.jsonl", chat), tiny_model, capsys)
    pairs = written("pairs.jsonl", [preference(number) for number in range(20)])
    other, _, words = planned("sft", pairs, tiny_model, capsys)

    assert code == other == 1
    assert "chat.jsonl, row 1: --task dpo was asked for; the row has no worse answer" in told
    assert "secret" not in told
    assert "pairs.jsonl, row 1" in words
    assert "--task dpo" in words


def test_the_plan_counts_both_answers_and_the_reference(
    tiny_model: Path, written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = written("pairs.jsonl", [preference(number) for number in range(64)])
    ways: list[dict[str, Any]] = []
    for more in ((), ("--precompute-ref-log-probs",)):
        _, found, _ = planned("dpo", rows, tiny_model, capsys, "--on", "rtx-3090", *more)
        # Of each tuner the first: the same on one device, whatever shares follow.
        listed = reversed(found["plan"]["alternatives"])
        ways.append({each["configuration"]["tuner"]: each for each in listed})
    live, noted = ways
    weights = 4 * read_facts(tiny_model).parameters  # full tuning holds float32

    assert live["lora"]["configuration"]["sequences"] == 2
    assert live["lora"]["step_seconds"] > 1.2 * noted["lora"]["step_seconds"]
    assert live["lora"]["peak_bytes"] == noted["lora"]["peak_bytes"]
    assert live["full"]["peak_bytes"] - noted["full"]["peak_bytes"] >= weights


def test_a_task_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "--task", "kto"]) == 2
    assert "mst dpo has a task already" in capsys.readouterr().err
    assert main(["simp"]) == 2
    assert "Did you mean simpo?" in capsys.readouterr().err
