"""`mst train --dp-epsilon` as a user types it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from mst import rundir
from mst.cli import main
from mst.durable import sha256
from mst.privacy.draws import KEY_FILE

pytest.importorskip("opacus", reason="wants the extra dp")


@pytest.fixture
def options(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> dict[str, str]:
    """A small private run; a test changes what it needs."""
    return {
        "model": str(tiny_model), "dataset": str(chat_rows), "output-dir": str(tmp_path / "run"),
        "device": "cpu", "threads": "1", "per-device-train-batch-size": "4",
        "gradient-accumulation-steps": "2", "max-steps": "6", "label-accuracy": "off",
        "dp-epsilon": "4", "val-size": "0", "save-steps": "1", "save-total-limit": "9",
    }  # fmt: skip


def flags(options: dict[str, str]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", value)]


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mst", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(*arguments: str) -> str:
    output, errors = (process := started(*arguments)).communicate(timeout=300)

    assert (process.returncode, errors) == (0, ""), output + errors
    return output


def test_a_run_says_its_epsilon_and_forgets_its_key(options: dict[str, str]) -> None:
    printed = finished(*flags(options))
    run = Path(options["output-dir"])
    manifest = rundir.read_manifest(run)
    lines = rundir.read_metrics(run)

    assert manifest.privacy is not None
    assert 3.9 < manifest.privacy.epsilon <= 4.0
    assert (manifest.privacy.units, manifest.privacy.unit) == (40, "row")
    assert manifest.privacy.sample_rate == pytest.approx(0.2)
    assert "epsilon" in printed
    assert "experimental" in printed
    assert not (run / KEY_FILE).exists()
    # Poisson draws: the steps hold unlike numbers of rows.
    assert len({line["units"] for line in lines}) > 1

    archive = run.with_name("a.zip")
    assert main(["audit", "pack", str(run), "--output", str(archive)]) == 0
    with zipfile.ZipFile(archive) as packed:
        budget = json.loads(packed.read("privacy-budget.json"))
        page = packed.read("index.html").decode()

    assert budget["differential_privacy"] == "holds"
    assert budget["epsilon"] == manifest.privacy.epsilon
    assert f"ε = {manifest.privacy.epsilon:.3f}" in page


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(options: dict[str, str], tmp_path: Path) -> None:
    run = Path(options["output-dir"])
    process = started(*flags(options | {"max-steps": "16"}))
    deadline = time.monotonic() + 120
    while not (run / "checkpoints/step-00000002").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    twin = tmp_path / "twin"
    while rundir.is_locked(run):
        time.sleep(0.05)
    shutil.copytree(run, twin)
    for each in sorted((twin / "checkpoints").glob("step-*")):
        if each.name > "step-00000001":
            shutil.rmtree(each)
    results = []
    for path in (run, twin):
        finished("--output-dir", str(path), "--resume")
        results.append(sha256(path / "adapter/adapter_model.safetensors"))

    assert results[0] == results[1]


@pytest.mark.slow
def test_a_resumed_run_has_the_steps_and_the_key_that_it_began_with(
    options: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(options["output-dir"])
    process = started(*flags(options | {"max-steps": "40", "dp-epsilon": "30"}))
    while not (run / "checkpoints/step-00000001").is_dir() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert rundir.read_manifest(run).status == "interrupted"
    longer = main(["train", "--output-dir", str(run), "--resume", "--max-steps", "60"])
    said = capsys.readouterr().err
    (run / KEY_FILE).unlink()
    output, errors = (process := started("--output-dir", str(run), "--resume")).communicate(
        timeout=120
    )

    assert longer == 1
    assert "has differential privacy for 40 steps" in said
    assert process.returncode == 1, output
    assert "noise.key is missing or damaged" in errors


REFUSED = [
    ({"tuner": "full"}, "--tuner full"), ({"tuner": "qlora"}, "--tuner qlora"),
    ({"task": "dpo"}, "--task dpo"), ({"nproc-per-node": "2"}, "several devices"),
    ({"deepspeed": "zero2"}, "--deepspeed zero2"), ({"dtype": "float16"}, "--dtype float16"),
    ({"max-grad-norm": "0"}, "--max-grad-norm 0"),
    ({"early-stopping-patience": "2"}, "--early-stopping-patience"),
    ({"dp-delta": "0.5"}, "--dp-delta 0.5"), ({"dp-unit": "patient"}, "--dp-unit patient"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_excludes_privacy_is_refused_before_anything_is_made(
    options: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    changes: dict[str, str], said: str,
) -> None:  # fmt: skip
    if "task" in changes:
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
        changes = changes | {"dataset": str(pairs)}
    code = main(["train", *flags(options | changes)])
    error = capsys.readouterr().err

    assert code == 1
    assert said in error
    assert not os.path.exists(options["output-dir"])


def test_options_of_privacy_without_an_epsilon_are_refused(
    options: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    del options["dp-epsilon"]
    code = main(["train", *flags(options | {"dp-delta": "1e-5"})])

    assert code == 1
    assert "--dp-delta 1e-05 was given without --dp-epsilon" in capsys.readouterr().err
