"""The embedded model and data: what a new user runs first, as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mst import rundir
from mst.data.formats import read
from mst.demo import demo_data
from mst.errors import ModelError
from mst.model.facts import read_facts
from mst.model.gguf import convert
from mst.model.locate import default_model


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this test's own, not there yet, so that the conversion is really made."""
    return tmp_path_factory.mktemp("user") / "cache"


def mst(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mst", *arguments],
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "COLUMNS": "160"},
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip


def test_no_held_out_row_is_trained_on() -> None:
    train, test = (
        {each.messages[1].content for each in read((path,)).rows} for path in demo_data()
    )

    assert len(test) == 240
    assert not train & test


def test_the_embedded_model_is_converted_once_even_by_two_at_once(cache: Path) -> None:
    command = [sys.executable, "-m", "mst", "plan", "--json", "--label-accuracy", "off"]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    both = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    plans = [json.loads(each.communicate(timeout=300)[0]) for each in both]
    copies = [each for each in (cache / "mst" / "models").iterdir() if each.is_dir()]

    assert len(copies) == 1
    assert plans[0]["plan"]["steps_per_epoch"] == 75
    assert plans[0]["model"]["parameters"] == 134_515_008
    written = (copies[0] / "model.safetensors").stat().st_mtime_ns
    assert convert(default_model().path, cache / "mst") == copies[0]
    assert (copies[0] / "model.safetensors").stat().st_mtime_ns == written
    assert read_facts(copies[0]).dtype == "BF16"


@pytest.mark.parametrize("data", [b"", b"not a model", b"GGUF" + b"\0" * 100])
def test_a_damaged_gguf_is_refused_and_leaves_nothing(tmp_path: Path, data: bytes) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        convert(broken, tmp_path / "cache")

    assert not [each for each in tmp_path.rglob("*") if each.is_dir() and "broken" in each.name]


@pytest.mark.slow
def test_the_base_model_answers(cache: Path) -> None:
    done = mst(cache, "chat", "--prompt", "What is the capital of France?")

    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


@pytest.mark.slow
def test_measuring_accuracy_takes_no_more_than_was_forecast_of_a_step(
    cache: Path, tmp_path: Path
) -> None:
    train, test = demo_data()
    run = tmp_path / "run"
    # The largest resident set among the command and all that it has started.
    command = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=2);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    done = subprocess.run(
        [
            sys.executable, "-c", command, sys.executable, "-m", "mst", "train",
            "--dataset", f"{train}#120", "--val-dataset", f"{test}#16", "--label-accuracy", "on",
            "--per-device-train-batch-size", "4", "--max-steps", "3", "--threads", "1",
            "--device", "cpu", "--output-dir", str(run),
        ],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = rundir.read_manifest(run).results
    largest = int(done.stdout) * 1024

    assert results["accuracy_rows"] == 16
    assert "accuracy_before_free" in results
    # Three steps are too few for the heap to grow as large as the forecast has it.
    assert 0.95 <= results["predicted_memory_bytes"] / results["peak_memory_bytes"] <= 1.30
    # Measured after the peak of training was taken, so it would not show there.
    assert largest <= 1.05 * results["predicted_memory_bytes"]


@pytest.mark.slow
def test_mst_train_alone_learns_the_intents(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    done = mst(cache, "train", "--device", "auto", "--output-dir", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    results = rundir.read_manifest(run).results

    assert results["accuracy_after_restricted"] >= 0.85
    assert results["accuracy_after_free"] >= 0.80
    assert results["accuracy_after_restricted"] > results["accuracy_before_restricted"] + 0.3
    assert results["accuracy_baseline"] > 0.9
    assert results["accuracy_rows"] == 240
    # Peaks of a heap that two threads fill differ by some percent from run to run.
    assert 0.92 <= results["predicted_memory_bytes"] / results["peak_memory_bytes"] <= 1.10
    for part in ("why", "memory", "TF-IDF + logistic regression", "next:", f"run     {run}"):
        assert part in done.stdout

    said = mst(
        cache, "chat", str(run), "--system", "Name the customer's intent.",
        "--prompt", "I think my new card is about to expire, what now?",
    )  # fmt: skip
    assert said.stdout.strip() == "card about to expire", said.stderr
