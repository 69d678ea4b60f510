"""The sweep over transformers' architectures: a sample of it, and what the docs say of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mst.model.families import known_families

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = (
    "llama", "qwen3", "mixtral", "gpt2", "bloom", "phi3", "falcon", "glm", "gemma2", "deepseek_v3",
    "opt", "qwen3_moe",
)  # fmt: skip


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_model_table", ROOT / "ci/make_model_table.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_sample_of_architectures_passes_every_step(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    output = tmp_path / "rows.jsonl"
    command = ["-m", "benchmarks.model_coverage", "--group", "causal", "--output", str(output)]
    families = tmp_path / "families.json"
    subprocess.run(
        [sys.executable, *command, "--families", str(families), "--only", *SAMPLE],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )
    rows = [json.loads(each) for each in output.read_text().splitlines()][:-1]
    failed = {row["model_type"]: row["steps"] for row in rows if not row["passed"]}
    learnt, shipped = json.loads(families.read_text()), known_families()

    assert len(rows) == len(SAMPLE)
    assert failed == {}
    assert {name: each["architecture"] for name, each in learnt.items()} == {
        name: shipped[name].architecture for name in learnt
    }


def test_the_docs_table_is_made_from_the_newest_results() -> None:
    assert script().main(["--check"]) == 0


def test_the_bar_of_90_percent_is_held() -> None:
    rows = [json.loads(each) for each in script().newest(ROOT).read_text().splitlines()]

    assert rows[-1]["summary"]["causal"]["share"] >= 0.9
    assert rows[-1]["summary"]["causal"]["architectures"] == 189


def test_only_proven_families_are_read_from_their_headers() -> None:
    rows = [json.loads(each) for each in script().newest(ROOT).read_text().splitlines()[:-1]]
    proven = {
        row["model_type"]
        for row in rows
        if row["group"] == "causal" and row["headers"] == "equal" and row["steps"]["facts"] == "ok"
    }

    assert set(known_families()) == proven
