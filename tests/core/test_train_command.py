"""`mst train` as a user types it: bad input, interruptions, two at once, resume."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mst import rundir
from mst.cli import main
from mst.training import checkpoint

SECRET = "patient 4711 has gout"


@pytest.fixture
def options(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> dict[str, str]:
    """Options of a small run; a test changes what it needs."""
    return {
        "model": str(tiny_model), "dataset": str(chat_rows), "output-dir": str(tmp_path / "run"),
        "device": "cpu", "threads": "1", "per-device-train-batch-size": "2",
        "gradient-accumulation-steps": "1", "max-steps": "6", "label-accuracy": "off",
    }  # fmt: skip


def flags(options: dict[str, str]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", value)]


def refused(options: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run in this process up to where a worker would start; return the one error."""
    code = main(["train", *flags(options)])
    text = capsys.readouterr().err

    assert code in (1, 2)
    assert "Traceback" not in text
    assert SECRET not in text
    return text


def mst(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mst", *arguments], capture_output=True, text=True, timeout=300
    )


def row(user: str, assistant: str) -> str:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return json.dumps({"messages": turns}) + "\n"


BAD_DATA: list[tuple[str, str, str]] = [
    ("rows.jsonl", "", "empty"),
    ("rows.jsonl", row(SECRET, "a") + '{"messages": [' + SECRET + "\n", "line 2"),
    ("rows.jsonl", row(SECRET, "a") + '{"other": "' + SECRET + '"}\n', "messages"),
    ("rows.json", "[]", "holds no rows"),
    ("rows.csv", "text,category\n" + SECRET + ",b\n", "category"),
    ("rows.parquet", SECRET, "cannot be read as parquet"),
]


@pytest.mark.parametrize(("name", "text", "said"), BAD_DATA)
def test_bad_data_is_named_and_never_quoted(
    options: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str, text: str, said: str,
) -> None:  # fmt: skip
    (tmp_path / name).write_text(text)
    error = refused(options | {"dataset": str(tmp_path / name)}, capsys)

    assert name in error
    assert said in error
    assert not (tmp_path / "run").exists()


def test_all_rows_too_long(options: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(options | {"max-length": "3"}, capsys)

    assert re.search(r"--max-length 3 leaves no row .*Pass --max-length \d+", error)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "./nowhere"}, "--model ./nowhere does not exist"),
        ({"model": "org/none"}, "never downloads"),
        ({"dataset": "./nowhere.jsonl"}, "nowhere.jsonl"),
        ({"device": "tpu"}, "tpu"),
        ({"dtype": "float8"}, "--dtype takes one of"),
        ({"dtype": "float16"}, "--dtype float16 was asked for"),
        ({"attn-implementation": "fused"}, "--attn-implementation fused was asked for"),
        ({"device": "cpu:9"}, "cpu has 1 of them"),
        ({"target-modules": "c_attn"}, "matches no linear layer"),
        ({"template": "./nowhere.jinja"}, "nowhere.jinja"),
        ({"lerning-rate": "1"}, "Did you mean --learning-rate"),
        ({"resume": "./nowhere"}, "no run directory"),
        ({"val-size": "0.1", "val-dataset": "other.jsonl"}, "were both given"),
    ],
)
def test_wrong_options_say_what_to_do(
    options: dict[str, str], capsys: pytest.CaptureFixture[str], change: dict[str, str], said: str
) -> None:
    assert said in refused(options | change, capsys)


def test_an_output_directory_of_another_run_is_kept(
    options: dict[str, str], finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "other"))
    before = sorted(each.relative_to(run) for each in run.rglob("*"))
    error = refused(options | {"output-dir": str(run)}, capsys)

    assert "holds another run (status: done)" in error
    assert sorted(each.relative_to(run) for each in run.rglob("*")) == before


def test_a_directory_that_is_no_run_is_refused(
    options: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("keep me")

    assert "is no run of mst" in refused(options | {"output-dir": str(tmp_path / "mine")}, capsys)
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_finished_run_cannot_be_resumed(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", "--output-dir", str(finished_run)]) == 1
    assert "nothing to resume" in capsys.readouterr().err


def test_a_run_ends_with_everything_in_its_directory(finished_run: Path) -> None:
    manifest = rundir.read_manifest(finished_run)
    names = {each.name for each in finished_run.iterdir()}

    assert {"run.json", "request.json", "plan.json", "facts.json", "metrics.jsonl"} <= names
    assert manifest.status == "done"
    assert manifest.outputs["adapter/adapter_model.safetensors"]
    assert manifest.results["steps"] == 4
    assert manifest.results["peak_memory_bytes"] > 100 * 2**20
    assert [each["step"] for each in rundir.read_metrics(finished_run)] == [1, 2, 2, 3, 4, 4]


def test_no_row_is_left_in_the_run_directory_or_the_output(
    options: dict[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(row(f"{SECRET} {i}", f"{SECRET} answer {i}") for i in range(30)))
    done = mst("train", *flags(options | {"dataset": str(data)}))

    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


@pytest.fixture
def started(options: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts a long run and waits for its first steps."""

    def start(**changes: str) -> subprocess.Popen[str]:
        run = Path(options["output-dir"])
        changed = {name.replace("_", "-"): value for name, value in changes.items()}
        command = [sys.executable, "-m", "mst", "train"]
        process = subprocess.Popen(
            [*command, *flags(options | {"max-steps": "100000", "save-steps": "50"} | changed)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 300  # a busy machine takes a minute to start alone
        while len(rundir.read_metrics(run)) <= 60 and process.poll() is None:
            assert time.monotonic() < deadline, "the run has not begun"
            time.sleep(0.1)
        return process

    return start


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_a_cancelled_job_saves_and_resume_goes_on(
    started: Callable[..., subprocess.Popen[str]], options: dict[str, str], number: signal.Signals
) -> None:
    run = Path(options["output-dir"])
    process = started()
    os.killpg(process.pid, number)  # as a terminal does, and Slurm's scancel
    _, errors = process.communicate(timeout=60)
    stopped_at = checkpoint.newest_whole(run / "checkpoints")

    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"mst train --output-dir {run} --resume" in errors
    assert rundir.state_of(run) == "interrupted"
    assert stopped_at is not None
    step = checkpoint.read_state(stopped_at).step
    assert rundir.read_metrics(run)[-1]["step"] == step

    if number == signal.SIGINT:
        done = mst("train", "--output-dir", str(run), "--resume", "--max-steps", str(step + 5))
        assert done.returncode == 0, done.stderr
        assert f"continuing after step {step}" in done.stdout
        assert rundir.read_manifest(run).results["steps"] == step + 5


def test_ctrl_c_while_a_worker_starts_is_told_in_words(options: dict[str, str]) -> None:
    run = Path(options["output-dir"])
    process = subprocess.Popen(
        [sys.executable, "-m", "mst", "train", *flags(options)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    parent = psutil.Process(process.pid)

    def importing() -> bool:
        with contextlib.suppress(psutil.Error):  # it ended in between
            return any("mst.training.worker" in each.cmdline() for each in parent.children(True))
        return False

    deadline = time.monotonic() + 60
    while not importing() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Interrupted: " in errors
    assert rundir.state_of(run) == "interrupted"


def test_resume_from_a_named_checkpoint_sets_newer_ones_aside(
    finished_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    whole = (run / "adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "adapter")
    rundir.update_manifest(run, status="interrupted")
    done = mst("train", "--resume", str(run / "checkpoints/step-00000002"))

    assert done.returncode == 0, done.stderr
    assert "continuing after step 2" in done.stdout
    assert checkpoint.is_whole(run / "set-aside/step-00000004")
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_a_compiled_run_that_goes_on_ends_with_the_same_bytes(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = mst(
        "train", "--model", str(tiny_model), "--dataset", str(chat_rows), "--device", "cpu",
        "--output-dir", str(run), "--torch-compile", "on", "--max-steps", "4", "--save-steps", "2",
        "--val-size", "0", "--label-accuracy", "off",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "uncompiled" not in done.stdout
    whole = (run / "adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "adapter")
    rundir.update_manifest(run, status="interrupted")
    done = mst("train", "--resume", str(run / "checkpoints/step-00000002"))

    assert done.returncode == 0, done.stderr
    assert "uncompiled" not in done.stdout
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == whole


def test_a_plan_of_a_resumed_run_keeps_its_options(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--json", "--resume", "--output-dir", str(finished_run)]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["total_steps"] == 4


@pytest.mark.slow
def test_kill_9_leaves_a_run_that_resumes(
    started: Callable[..., subprocess.Popen[str]], options: dict[str, str], chat_rows: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    data = tmp_path / "own.jsonl"
    shutil.copy(chat_rows, data)
    run = Path(options["output-dir"])
    process = started(dataset=str(data))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)

    assert rundir.state_of(run) == "killed"
    resume = ["train", "--output-dir", str(run), "--resume"]
    # What shapes a step may not change under a resumed run: options, or the data itself.
    found = mst(*resume, "--lora-rank", "2")
    assert found.returncode == 1
    assert "other values of --lora-rank" in found.stderr
    whole = data.read_text()
    data.write_text(whole + whole)
    found = mst(*resume)
    assert found.returncode == 1
    assert "data of" in found.stderr
    assert "changed" in found.stderr
    data.write_text(whole)
    done = mst(*resume, "--max-steps", "300")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_runs_on_one_directory(
    started: Callable[..., subprocess.Popen[str]], options: dict[str, str]
) -> None:
    process = started()
    try:
        for extra in ([], ["--resume"]):
            second = mst("train", *flags(options), *extra)
            assert second.returncode == 1
            assert f"in use by another mst (process {process.pid})" in second.stderr
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)


@pytest.mark.slow
def test_the_worker_does_not_outlive_its_parent(
    started: Callable[..., subprocess.Popen[str]], options: dict[str, str]
) -> None:
    process = started()
    os.kill(process.pid, signal.SIGKILL)  # the parent alone
    process.communicate(timeout=60)
    run = Path(options["output-dir"])
    for _ in range(100):
        if not rundir.is_locked(run):
            break
        time.sleep(0.1)

    assert rundir.state_of(run) == "interrupted"


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_it_resumes_with_space(
    options: dict[str, str], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "mst-test", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        run = disk / "run"
        # Each checkpoint takes some 330 kB, so that the disk is full after a few.
        tight = options | {
            "output-dir": str(run), "max-steps": "60", "save-steps": "2", "save-total-limit": "50",
        }  # fmt: skip
        found = mst("train", *flags(tight))
        newest = checkpoint.newest_whole(run / "checkpoints")

        assert found.returncode == 1, found.stdout + found.stderr
        assert "No space left on device" in found.stderr
        assert "--resume" in found.stderr
        assert "Traceback" not in found.stderr
        assert newest is not None
        assert not list((run / "checkpoints").glob(".*.part"))
        remount = ["mount", "-o", "remount,size=64m", str(disk)]
        subprocess.run(remount, check=True)
        done = mst("train", "--output-dir", str(run), "--resume")
        assert done.returncode == 0, done.stderr
        step = checkpoint.read_state(newest).step
        assert f"continuing after step {step}" in done.stdout
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_learning_rate_that_explodes_stops_with_the_step(options: dict[str, str]) -> None:
    found = mst(
        "train",
        *flags(options | {"learning-rate": "1e30", "max-steps": "40", "warmup-ratio": "0"}),
        "--max-grad-norm", "0",
    )  # fmt: skip

    assert found.returncode == 1
    assert re.search(r"not finite at step \d+", found.stderr)
    assert "Traceback" not in found.stderr
    assert rundir.state_of(Path(options["output-dir"])) == "failed"


def test_a_model_that_mixes_packed_rows_is_padded_and_that_is_said(
    options: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    # ALiBi takes no position_ids: a row would see the one that lies before it.
    bloom = tmp_path / "bloom"
    config = BloomConfig(vocab_size=6400, hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(bloom)
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / each, bloom)
    options |= {"model": str(bloom), "max-steps": "1", "val-size": "0"}
    done = mst("train", *flags(options))
    packed = mst("train", "--packing", *flags(options | {"output-dir": str(tmp_path / "packed")}))

    assert done.returncode == 0, done.stderr
    assert "does not keep rows apart" in " ".join(done.stdout.split())
    assert packed.returncode == 1
    assert "Leave --packing out" in packed.stderr
