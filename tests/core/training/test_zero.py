"""ZeRO through DeepSpeed: the losses of one process, and checkpoints that any strategy takes up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mst import rundir
from mst.errors import EXIT_OUT_OF_MEMORY
from mst.plan import Plan
from mst.rundir import CHECKPOINTS, PLAN, read_document, read_manifest, read_metrics
from mst.training import checkpoint

pytest.importorskip("deepspeed", reason="wants DeepSpeed: pip install mst-train[deepspeed]")
STRATEGIES = ("off", "zero1", "zero2", "zero3")
# 37 rows to train on: the last step of an epoch has 5, in three micro-batches for two ranks.
OPTIONS = {
    "device": "cpu", "dtype": "float32", "max-steps": 6, "val-size": 3, "eval-steps": 3,
    "save-steps": 3, "learning-rate": 0.01, "label-accuracy": "off", "optim": "adamw_torch",
    "gradient-accumulation-steps": 2, "per-device-train-batch-size": 4,
}  # fmt: skip


def train(
    model: Path, rows: Path, run: Path, environ: dict[str, str] | None = None, **changes: object
) -> subprocess.CompletedProcess[str]:
    return asked("train", model, rows, run, environ, **changes)


def asked(
    command: str,
    model: Path,
    rows: Path,
    run: Path,
    environ: dict[str, str] | None = None,
    **changes: object,
) -> subprocess.CompletedProcess[str]:
    given = {name.replace("_", "-"): value for name, value in changes.items()}
    values = {"model": model, "dataset": rows, "output-dir": run, **OPTIONS, **given}
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return mst(command, *flags, environ=environ)


def mst(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **(environ or {})}
    return subprocess.run(
        [sys.executable, "-m", "mst", *arguments],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def losses(run: Path) -> list[float]:
    return [float(one.get("loss", one.get("eval_loss", 0))) for one in read_metrics(run)]


def norms(run: Path) -> list[float]:
    return [float(one["grad_norm"]) for one in read_metrics(run) if "grad_norm" in one]


@pytest.fixture(scope="module")
def alone(
    tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run of one process for each tuner."""
    runs = {}
    for tuner in ("full", "lora"):
        runs[tuner] = tmp_path_factory.mktemp("zero") / tuner
        done = train(tiny_model, chat_rows, runs[tuner], tuner=tuner)
        assert done.returncode == 0, done.stdout + done.stderr
    return runs


@pytest.fixture(scope="module")
def shared(
    tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run of two processes for each strategy, full tuning: the same rows a step.

    They compute one of the two layers twice. Beside each lie an empty home directory, DeepSpeed's
    builds with the lock of a build that died, and what the command said.
    """
    runs = {}
    for strategy in STRATEGIES:
        place = tmp_path_factory.mktemp("zero")
        runs[strategy] = place / strategy
        (place / "home").mkdir()
        lock = place / "builds/deepspeed_shm_comm/lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        environ = {
            "HOME": str(place / "home"), "TORCH_EXTENSIONS_DIR": str(place / "builds"),
            "XDG_CACHE_HOME": str(place / "cache"), "MPLCONFIGDIR": str(place / "cache"),
        }  # fmt: skip
        done = train(
            tiny_model, chat_rows, runs[strategy], environ, tuner="full", deepspeed=strategy,
            nproc_per_node=2, per_device_train_batch_size=2, gradient_checkpointing=1,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (place / "said").write_text(done.stdout + done.stderr)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_have_the_losses_of_one(
    strategy: str, alone: dict[str, Path], shared: dict[str, Path]
) -> None:
    run = shared[strategy]
    plan = read_document(Plan, run, PLAN)

    assert plan.strategy == ("ddp" if strategy == "off" else strategy)
    assert plan.torch_devices == ("cpu", "cpu")
    assert losses(run) == pytest.approx(losses(alone["full"]), rel=1e-5)
    assert len(losses(run)) == 8
    # AdamW hides a wrong scale of the gradients. torch's float32 norm is off by 1e-4 on a CPU.
    assert norms(run) == pytest.approx(norms(alone["full"]), rel=1e-3)
    assert not [each for each in run.iterdir() if each.name.startswith((".builds", ".rendezvous"))]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_the_result_of_shares_is_the_whole_model(
    strategy: str, alone: dict[str, Path], shared: dict[str, Path]
) -> None:
    from safetensors.torch import load_file

    whole = load_file(alone["full"] / "model/model.safetensors")
    found = load_file(shared[strategy] / "model/model.safetensors")

    assert {name: each.shape for name, each in found.items()} == {
        name: each.shape for name, each in whole.items()
    }
    for name, each in whole.items():
        assert (found[name] - each).abs().max() < 2e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3"])
def test_adapters_under_zero_have_the_losses_of_one_process(
    strategy: str, alone: dict[str, Path], tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = train(
        tiny_model, chat_rows, run, tuner="lora", deepspeed=strategy, nproc_per_node=2,
        per_device_train_batch_size=2,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == pytest.approx(losses(alone["lora"]), rel=1e-5)
    assert (run / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "processes", "after"),
    [("zero3", 1, "off"), ("zero2", 4, "zero3"), ("off", 1, "zero2"), ("zero1", 1, "off")],
)  # fmt: skip
def test_a_checkpoint_of_two_resumes_on_one_and_on_four_in_any_strategy(
    before: str, processes: int, after: str, shared: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(shared[before], run, ignore=shutil.ignore_patterns("step-00000006", "model"))
    rundir.update_manifest(run, status="failed", finished=None, results={}, outputs={})
    done = mst(
        "train", "--output-dir", str(run), "--resume", "--nproc-per-node", str(processes),
        "--deepspeed", after,
    )  # fmt: skip

    plan = read_document(Plan, run, PLAN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing after step 3" in done.stdout
    assert (plan.world_size, plan.global_batch) == (processes, 8)
    assert losses(run) == pytest.approx(losses(shared[before]), rel=1e-5)


@pytest.mark.slow
def test_weights_that_are_really_shared_out_give_the_losses_of_one_process(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # ZeRO-3 leaves weights of less than 100,000 values whole, as all layers of the tiny model.
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6400, hidden_size=384, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=6, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(model)
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / each, model)
    found = []
    runs: dict[str, dict[str, Any]] = {
        "one": {"per_device_train_batch_size": 4},
        "two": {"per_device_train_batch_size": 2, "nproc_per_node": 2, "deepspeed": "zero3"},
    }
    for name, more in runs.items():
        done = train(
            model, chat_rows, tmp_path / name, tuner="lora", max_steps=2, val_size=0,
            gradient_accumulation_steps=1, **more,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(losses(tmp_path / name))

    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert len(found[0]) == 2


@pytest.mark.slow
def test_a_stale_build_lock_hangs_nothing_and_nothing_is_left_in_the_home_directory(
    shared: dict[str, Path],
) -> None:
    place = shared["zero2"].parent
    builds = place / "builds"

    assert list((place / "home").rglob("*")) == []
    assert sorted(each.name for each in builds.rglob("*")) == ["deepspeed_shm_comm", "lock"]
    for word in ("WARNING", "INFO", "FutureWarning", "Traceback"):
        assert word not in (place / "said").read_text()


# Takes the memory of rank 1 once a checkpoint is there: its next large tensor does not fit.
STARVE = """
import glob, os, resource, sys, threading, time

def starve(run):
    while not glob.glob(run + "/checkpoints/step-*"):
        time.sleep(0.01)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + (1 << 17)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

words = sys.orig_argv
if "mst.training.worker" in words and words[words.index("mst.training.worker") + 2] == "1":
    run = words[words.index("mst.training.worker") + 1]
    threading.Thread(target=starve, args=(run,), daemon=True).start()
"""


@pytest.mark.slow
def test_one_rank_out_of_memory_ends_the_job_in_words_with_its_checkpoint(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run, hook = tmp_path / "run", tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(STARVE)
    done = train(
        tiny_model, chat_rows, run, {"PYTHONPATH": str(hook)}, deepspeed="zero2", tuner="full",
        nproc_per_node=2, max_steps=2000, save_steps=3, eval_steps=2000, on_oom="stop",
        per_device_train_batch_size=8,
    )  # fmt: skip

    assert done.returncode == EXIT_OUT_OF_MEMORY, done.stdout + done.stderr
    assert "OutOfMemory: cpu ran out of memory in step" in done.stderr
    assert "Traceback" not in done.stderr
    assert read_manifest(run).status == "failed"
    assert checkpoint.newest_whole(run / CHECKPOINTS) is not None


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_file_that_contradicts_the_plan_is_refused_before_anything_is_claimed(
    command: str, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    done = asked(
        command, tiny_model, chat_rows, tmp_path / "run",
        tuner="full", deepspeed=file, nproc_per_node=2,
    )  # fmt: skip

    assert done.returncode == 1
    assert "bf16 is enabled, but the plan computes in float32" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
